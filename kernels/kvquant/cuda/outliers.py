"""Outliers on CUDA: their parts are added up as integers in shared memory, one entry a lane."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from regraft.kernels.device import (
    Expr,
    address,
    call,
    let,
    registers,
    store,
    wide,
)
from regraft.kernels.kvquant.cuda.keys import FRACTION, Keys
from regraft.kernels.kvquant.cuda.plan import TILE_ROW


class Outliers(Keys):
    """The part of ``Attend`` that uses outliers."""

    entries: dict[str, Any]
    range: dict[str, Any]
    fraction: Any

    def _load_offsets(self, block: Expr, slot: int) -> None:
        """Lanes 0..3 of a slot: begin and end of a block's outliers, of keys and of values."""
        case, a, warp = self.case, self.a, self.warp
        slot = 2 if slot == 1 else slot
        at = let((self.batch * a.capacity + block) * (case.heads + 1) + self.head + warp.lane % 2)
        for kind, lanes in (("key", 0), ("value", 1)):
            if getattr(case, f"{kind}_outliers"):
                with T.If(warp.lane // 2 == lanes), T.Then():
                    store(self.place, 2, a.offsets[kind][at])

    def _slice(self, kind: str, slot: int) -> tuple[Expr, Expr]:
        lane = 0 if kind == "key" else 2
        return (
            call("int_from_lane", self.place[slot], lane),
            call("int_from_lane", self.place[slot], lane + 1),
        )

    def _entry_base(self, kind: str, block: Expr) -> Expr:
        places = self.a.key_places if kind == "key" else self.a.value_places
        return wide(self.batch * self.a.capacity + block) * wide(places)

    def _load_entries(self, kind: str, block: Expr) -> None:
        if not getattr(self.case, f"{kind}_outliers"):
            return
        low, high = self._slice(kind, 2 if kind == "key" else 1)
        store(self.range[kind], 0, low)
        store(self.range[kind], 1, high)
        base = let(self._entry_base(kind, block))
        for turn in range(2):
            at = let(low + turn * 32 + self.warp.lane)
            store(self.entries[kind], turn, self.warp.lane << 24 | self.warp.lane << 16)
            with T.If(at < high), T.Then():
                word = call("load4", address(self.a.outliers[kind], base + wide(at)))
                store(self.entries[kind], turn, T.reinterpret("int32", word))

    def _each_entry(self, kind: str, block: Expr, use: Any) -> None:
        """Call use(entry) for each outlier of the block and head; lanes without one use a zero."""
        for turn in range(2):
            use(self.entries[kind][turn])
        low, high = let(self.range[kind][0]), let(self.range[kind][1])
        with T.If(high - low > 64), T.Then():
            base = let(self._entry_base(kind, block))
            with T.serial(2, (high - low + 31) // 32) as turn:
                at = let(low + turn * 32 + self.warp.lane)
                with T.If(at < high), T.Then():
                    word = call("load4", address(self.a.outliers[kind], base + wide(at)))
                    use(let(T.reinterpret("int32", word)))

    def _key_outliers(self, stage: Expr, block: Expr) -> None:
        """Add the outliers' products with the queries into the warp's tile [token, row]."""
        case, warp, layout = self.case, self.warp, self.layout
        tile = let(self.own + layout.tile)
        for i in range(case.row_stride):
            place = tile + (i * TILE_ROW + warp.lane) * 4
            call("write4", address(self.shared, place), T.uint32(0))
        call("sync_warp")
        half = case.size // 2
        words = registers(4, "uint32")

        def use(entry: Expr) -> None:
            token, channel = let(entry >> 24), let(entry >> 16 & 255)
            value = _residual(entry)
            second = let(channel >= half)
            pair = let(T.if_then_else(second, channel - half, channel))
            zero = T.float32(0)
            if case.rotated:
                at = let(stage + token * layout.row + pair // 2 * 8)
                call("copy8", address(words, 0), address(self.shared, at))
                odd = let(T.cast(pair % 2 * 16, "uint32"))
                cos, sin = (call("float_f16", words[i] >> odd) for i in range(2))
                x = let(T.if_then_else(second, -sin, cos) * value * T.float32(FRACTION))
                y = let(T.if_then_else(second, cos, sin) * value * T.float32(FRACTION))
            else:
                x = let(T.if_then_else(second, zero, value) * T.float32(FRACTION))
                y = let(T.if_then_else(second, value, zero) * T.float32(FRACTION))
            for start in range(0, case.row_stride, 4):
                place = self.own + layout.query + (pair * case.row_stride + start) * 4
                call("copy16", address(words, 0), address(self.shared, place))
                for row in range(4):
                    a = call("float_f16", words[row])
                    b = call("float_f16", words[row] >> T.uint32(16))
                    place = tile + ((start + row) * TILE_ROW + token) * 4
                    part = call("round", a * x + b * y)
                    call("atomic_add", address(self.shared, place), part)

        self._each_entry("key", block, use)
        call("sync_warp")

    def _value_outliers(self, block: Expr, turn: Expr) -> None:
        """Add the outliers times the weights into the warp's [row, channel], as integers."""
        case, warp, layout, flash = self.case, self.warp, self.layout, self.flash
        tile = let(self.own + layout.tile)
        call("sync_warp")
        for part in range(case.tiles):
            with T.If(8 * part + 2 * warp.q < case.row_stride), T.Then():
                for i in range(4):
                    place = (8 * i + warp.g) * case.row_stride + 8 * part + 2 * warp.q
                    pair = [call("as_word", flash.scores[part * 8 + i * 2 + e]) for e in range(2)]
                    call("write8", address(self.shared, tile + place * 4), *pair)
        self._choose_fraction(block, turn)
        call("sync_warp")
        words = registers(4, "uint32")

        def use(entry: Expr) -> None:
            token, channel = let(entry >> 24), let(entry >> 16 & 255)
            value = let(_residual(entry) * self.fraction[0])
            for start in range(0, case.row_stride, 4):
                place = tile + (token * case.row_stride + start) * 4
                call("copy16", address(words, 0), address(self.shared, place))
                for row in range(min(4, case.rows - start)):
                    place = (start + row) * layout.sums + channel
                    place = self.own + layout.extra + place * 4
                    part = call("round", call("as_float", words[row]) * value)
                    call("atomic_add", address(self.shared, place), part)

        self._each_entry("value", block, use)

    def _choose_fraction(self, block: Expr, turn: Expr) -> None:
        """Flush before integers can overflow: at most 32 are added to one of them in a turn."""
        largest = registers(2)
        store(largest, 0, self.flash.scores[0])
        for i in range(1, self.case.tiles * 8):
            store(largest, 0, T.max(largest[0], self.flash.scores[i]))
        store(largest, 1, T.float32(0))

        def use(entry: Expr) -> None:
            store(largest, 1, T.max(largest[1], T.abs(_residual(entry))))

        self._each_entry("value", block, use)
        bound = [
            call("as_float", call("warp_max_word", call("as_word", largest[i]))) for i in range(2)
        ]
        bound_ = let(bound[0] * bound[1])
        full = T.Or(bound_ * self.fraction[0] > T.float32(2.0**21), turn % 16 == 15)
        with T.If(full), T.Then():
            self._flush()
            least = T.max(bound_, T.float32(2.0**-100))
            store(self.fraction, 0, T.min(self.fraction[0], T.float32(2.0**20) / least))
            store(self.fraction, 1, T.float32(1) / self.fraction[0])

    def _flush(self) -> None:
        """Add the integers [row, channel] to the outputs and clear them."""
        case, warp, flash = self.case, self.warp, self.flash
        call("sync_warp")
        for tile in range(case.tiles):
            with T.If(8 * tile + 2 * warp.q < case.row_stride), T.Then():
                for part in range(case.value_size // 16):
                    for half in range(2):
                        for e in range(2):
                            row = 8 * tile + 2 * warp.q + e
                            place = row * self.layout.sums + part * 16 + half * 8 + warp.g
                            place = self.own + self.layout.extra + place * 4
                            where = address(self.shared, place)
                            sum_ = T.reinterpret("int32", call("read4", where))
                            at = (tile * flash.parts + part) * 4 + half * 2 + e
                            sum_ = T.cast(sum_, "float32") * self.fraction[1]
                            store(flash.out, at, flash.out[at] + sum_)
                            call("write4", where, T.uint32(0))
        call("sync_warp")


def _residual(entry: Expr) -> Expr:
    return call("float_f16", T.cast(entry & 0xFFFF, "uint32"))
