"""Outliers on CUDA: one entry a lane, added up without atomics.

A head's entries are sorted by what they are added to, a key's token or a value's channel. A lane
whose entry is the r-th of a run of equal ones adds it in turn r, when no other lane adds there.
"""

from __future__ import annotations

from collections.abc import Callable
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
    wide_row,
)
from regraft.kernels.kvquant.cuda.keys import Keys
from regraft.kernels.kvquant.layout import BLOCK


class Outliers(Keys):
    """The part of ``Attend`` that uses outliers."""

    entries: dict[str, Any]
    range: dict[str, Any]

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

    def _load_entries(self, kind: str, block: Expr) -> None:
        """Load the first two entries that a lane uses of the block and head."""
        if not getattr(self.case, f"{kind}_outliers"):
            return
        low, high = self._slice(kind, 2 if kind == "key" else 1)
        store(self.range[kind], 0, low)
        store(self.range[kind], 1, high)
        count = let((high - low + 31) // 32)
        own = let(low + self.warp.lane * count)
        base = self._entry_base(kind, block)
        for turn in range(2):
            store(self.entries[kind], turn, T.int32(0))
            used = T.And(turn < count, own + turn < high) if turn else own < high
            with T.If(used), T.Then():
                self._load_entry(kind, turn, base, own + turn)

    def _entry_base(self, kind: str, block: Expr) -> Expr:
        places = self.a.key_places if kind == "key" else self.a.value_places
        return let(wide_row(self.batch * self.a.capacity + block) * wide_row(places))

    def _load_entry(self, kind: str, turn: int, base: Expr, at: Expr) -> None:
        word = call("load4", address(self.a.outliers[kind], base + wide(at)))
        store(self.entries[kind], turn, T.reinterpret("int32", word))

    def _each_entry(
        self, kind: str, block: Expr, use: Callable[[Expr, Callable[..., None]], None]
    ) -> None:
        """Call use(entry, in_turns) for one outlier a lane of the block and head at a time.

        A lane has neighbours, so that few lanes have the same token or channel at a time.
        in_turns(add) runs add() when no other lane adds to the same.
        """
        low, high = let(self.range[kind][0]), let(self.range[kind][1])
        count = let((high - low + 31) // 32)
        own = let(low + self.warp.lane * count)
        at = registers(1, "int32")
        store(at, 0, T.int32(0))
        with T.While(at[0] < count):
            place = let(own + at[0])
            store(at, 0, at[0] + 1)
            entry = let(self.entries[kind][0])
            store(self.entries[kind], 0, self.entries[kind][1])
            with T.If(T.And(at[0] + 1 < count, place + 2 < high)), T.Then():
                self._load_entry(kind, 1, self._entry_base(kind, block), place + 2)
            turn = self._turn_of(entry >> 24 if kind == "key" else entry >> 16 & 255, place < high)
            turns = T.cast(call("warp_max_word", T.cast(turn, "uint32")), "int32")

            def in_turns(add: Callable[[], None], own: Expr = turn, turns: Expr = turns) -> None:
                turn = registers(1, "int32")
                store(turn, 0, T.int32(1))
                with T.While(turn[0] <= turns):
                    with T.If(own == turn[0]), T.Then():
                        add()
                    call("sync_warp")
                    store(turn, 0, turn[0] + 1)

            use(entry, in_turns)

    def _adding(self, place: Expr, part: list[Expr]) -> Callable[[], None]:
        """What adds four numbers to those at a place of the shared memory."""
        place = let(place)
        sums = registers(4)

        def add() -> None:
            call("copy16", address(sums, 0), address(self.shared, place))
            for i in range(4):
                store(sums, i, sums[i] + part[i])
            call("copy16", address(self.shared, place), address(sums, 0))

        return add

    def _turn_of(self, place: Expr, used: Expr) -> Expr:
        """1 + how many lanes just before this one have the same place; 0 for one not used."""
        lane, place = self.warp.lane, let(place)
        before = call("int_from_lane", place, lane - 1)
        begins = T.Or(lane == 0, place != before)
        begins = call("ballot", T.cast(begins, "int32"))
        rank = call("leading_zeros", begins << T.cast(31 - lane, "uint32"))
        return let(T.if_then_else(used, rank + 1, 0))

    def _key_outliers(self, block: Expr) -> None:
        """Add the outliers' products with the queries into the warp's tile, [four rows, token,
        row]."""
        case, warp, layout = self.case, self.warp, self.layout
        tile = let(self.own + layout.tile)
        for start in range(0, case.row_stride, 4):
            place = tile + start * (4 * BLOCK) + warp.lane * 16
            call("write16", address(self.shared, place), *[T.uint32(0)] * 4)
        call("sync_warp")
        words = registers(8, "uint32")

        def use(entry: Expr, in_turns: Callable[..., None]) -> None:
            token, channel = let(entry >> 24), let(entry >> 16 & 255)
            second = let(T.cast(channel >= case.size // 2, "int32"))
            pair = let(channel - second * (case.size // 2))
            odd = let(T.cast(pair % 2, "uint32"))
            residual = T.reinterpret("uint32", entry)
            if case.rotated:
                at = let(self.angles + token * layout.row + pair // 2 * 8)
                call("copy8", address(words, 0), address(self.shared, at))
                # (cos, sin), or (-sin, cos) for the second channel of a pair
                order = T.if_then_else(second > 0, T.uint32(0x1054), T.uint32(0x5410))
                turn = call("permute", words[0], words[1], order + odd * T.uint32(0x2222))
                turn = turn ^ T.cast(second << 15, "uint32")
                residual = call("permute", residual, residual, T.uint32(0x1010))
                factor = call("mul2", turn, residual)
            else:
                order = T.if_then_else(second > 0, T.uint32(0x1044), T.uint32(0x4410))
                factor = call("permute", residual, T.uint32(0), order)
            factors = [call("permute", factor, factor, T.uint32(x)) for x in (0x1010, 0x3232)]
            both = let(T.uint32(0x5410) + odd * T.uint32(0x2222))
            for start in range(0, case.row_stride, 4):
                for half in range(2):
                    place = layout.fragment + self._fragment(start + 2 * half, pair // 2)
                    call("copy16", address(words, half * 4), address(self.shared, self.own + place))
                part: list[Expr] = []
                for i in (0, 4):
                    x, y = (call("permute", words[i + j], words[i + 2 + j], both) for j in range(2))
                    sum_ = call("fma2", y, factors[1], call("mul2", x, factors[0]))
                    part += call("float_f16", sum_), call("float_f16", sum_ >> T.uint32(16))
                in_turns(self._adding(tile + (start * BLOCK + token * 4) * 4, part))

        self._each_entry("key", block, use)
        call("sync_warp")

    def _value_outliers(self, block: Expr) -> None:
        """Add the outliers times the weights into the warp's sums, [four rows, channel, row]."""
        case, warp, layout, flash = self.case, self.warp, self.layout, self.flash
        tile = let(self.own + layout.tile)
        call("sync_warp")
        for part in range(case.tiles):
            row = let(8 * part + 2 * warp.q)
            with T.If(row < case.row_stride), T.Then():
                for i in range(4):
                    place = row // 4 * (16 * BLOCK) + (8 * i + warp.g) * 16 + row % 4 * 4
                    pair = [call("as_word", flash.scores[part * 8 + i * 2 + e]) for e in range(2)]
                    call("write8", address(self.shared, tile + place), *pair)
        call("sync_warp")
        words = registers(4, "uint32")

        def use(entry: Expr, in_turns: Callable[..., None]) -> None:
            token, channel = let(entry >> 24), let(entry >> 16 & 255)
            value = call("float_f16", T.reinterpret("uint32", entry))
            for start in range(0, case.row_stride, 4):
                place = tile + (start * BLOCK + token * 4) * 4
                call("copy16", address(words, 0), address(self.shared, place))
                part = [let(call("as_float", words[i]) * value) for i in range(4)]
                place = self.own + layout.extra + (start * case.value_size + channel * 4) * 4
                in_turns(self._adding(place, part))

        self._each_entry("value", block, use)

    def _flush(self) -> None:
        """Add the values' sums to the outputs and clear them."""
        case, warp, flash = self.case, self.warp, self.flash
        words = registers(2, "uint32")
        call("sync_warp")
        for tile in range(case.tiles):
            row = let(8 * tile + 2 * warp.q)
            with T.If(row < case.row_stride), T.Then():
                for part in range(case.value_size // 16):
                    for half in range(2):
                        channel = part * 16 + half * 8 + warp.g
                        place = (row // 4 * (4 * case.value_size) + channel * 4 + row % 4) * 4
                        where = address(self.shared, self.own + self.layout.extra + place)
                        call("copy8", address(words, 0), where)
                        call("write8", where, T.uint32(0), T.uint32(0))
                        for e in range(2):
                            at = (tile * flash.parts + part) * 4 + half * 2 + e
                            store(flash.out, at, flash.out[at] + call("as_float", words[e]))
        call("sync_warp")
