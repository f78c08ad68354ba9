"""Scores of packed keys on CUDA: queries, rotations, and keys scaled and rotated in registers."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from regraft.kernels.attention.flash import LOG2E, Flash
from regraft.kernels.device import (
    BITS,
    Expr,
    address,
    call,
    let,
    registers,
    store,
    warp_max,
    wide,
    wide_row,
)
from regraft.kernels.kvquant.cuda.codes import Codes
from regraft.kernels.kvquant.layout import BLOCK


class Keys(Codes):
    """The part of ``Attend`` that scores a block."""

    flash: Flash
    batch: Any
    head: Any
    sub: Any
    own: Any
    first_row: Any
    keys: Any
    place: Any
    angles: Any
    rotations: Any

    def _query(self) -> None:
        """Queries as float16 operands, each row divided by its largest element."""
        case, warp, a = self.case, self.warp, self.a
        steps = case.size // 16
        self.query = registers(case.tiles * steps * 2, "uint32")
        self.row_scale = registers(case.tiles * 2)
        raw = registers(steps * 2, "uint32")
        for tile in range(case.tiles):
            row = let(self.first_row + 8 * tile + warp.g)
            base = let(wide(self.line * case.rows + row) * case.size)
            largest = registers(1)
            store(largest, 0, T.float32(1e-30))
            for at in range(steps * 2):
                channel = at // 2 * 8 + at % 2 * (case.size // 2) + 2 * warp.q
                store(raw, at, T.uint32(0))
                with T.If(row < case.rows), T.Then():
                    store(raw, at, call("read4", address(a.q, base + wide(channel))))
                for e in range(2):
                    store(largest, 0, T.max(largest[0], T.abs(self._element(raw[at], e))))
            norm = let(warp_max(largest[0], (1, 2)))
            for at in range(steps * 2):
                pair = [self._element(raw[at], e) / norm for e in range(2)]
                store(self.query, tile * steps * 2 + at, call("pack_f16", *pair))
            for e in range(2):
                lane = let((2 * warp.q + e) * 4)
                unit = a.scale * T.float32(1.0 if case.softcap else LOG2E)
                store(self.row_scale, tile * 2 + e, call("from_lane", norm, lane) * unit)
            self._share_fragments(tile, steps)
        count = case.row_stride * case.value_size if case.value_outliers else 0
        for start in range(0, count, 32):
            place = self.own + self.layout.extra + (start + warp.lane) * 4
            with T.If(start + warp.lane < count), T.Then():
                call("write4", address(self.shared, place), T.uint32(0))

    def _element(self, word: Expr, e: int) -> Expr:
        return call(f"float_{BITS[self.case.dtype]}", word >> T.uint32(16) if e else word)

    def _share_fragments(self, tile: int, steps: int) -> None:
        """Keep the operands out of the registers: two words of a row and of two pairs."""
        start = self.layout.query if self.case.rotated else self.layout.fragment
        with T.If(self.warp.g < min(8, self.case.row_stride)), T.Then():
            for step in range(steps):
                pair = [self.query[(tile * steps + step) * 2 + i] for i in range(2)]
                place = start + self._fragment(8 * tile + self.warp.g, step * 4 + self.warp.q)
                call("write8", address(self.shared, self.own + place), *pair)

    def _fragment(self, row: Any, couple: Expr) -> Any:
        """Where a row's operands of channels 2 * couple and D/2 + 2 * couple lie, 8 bytes."""
        return row // 2 * self.layout.two_rows + couple * 16 + row % 2 * 8

    # rotations: queries are turned back to the last token of the block once, keys by what is left

    def _load_rotations(self, block: Expr) -> None:
        """Load the rotations of the block's last and first token, two pairs of channels a lane."""
        for i in range(self.couples):
            couple = let(i * 32 + self.warp.lane)
            with T.If(couple < self.case.size // 4), T.Then():
                for j, token in enumerate((BLOCK - 1, 0)):
                    words = address(self.rotations, 4 * i + 2 * j)
                    call("copy8", words, self._rotation(block, token, couple))

    def _rotation(self, block: Expr, token: Any, couple: Expr) -> Expr:
        a, size = self.a, self.case.size
        row = wide_row(self.batch * a.table_batch * a.table_capacity + block) * (BLOCK * size)
        return address(a.table, row + wide(token * size + couple * 4))

    def _rotate(self, block: Expr, turn: Expr) -> None:
        """Turn the queries to the block's last token.

        The tokens' rotations relative to it stay those of an earlier block as long as the first
        token's is right; else, or at first, the block's own take their place.
        """
        case, layout, words = self.case, self.layout, self.rotations
        wrong = registers(1, "uint32")
        store(wrong, 0, T.uint32(0))
        relative = registers(2, "uint32")
        for i in range(self.couples):
            couple = let(i * 32 + self.warp.lane)
            with T.If(couple < case.size // 4), T.Then():
                call("copy8", address(relative, 0), address(self.shared, self.angles + couple * 8))
                cos, sin = self._turned(relative[0], relative[1], words[4 * i], words[4 * i + 1])
                off = call("sub2", cos, words[4 * i + 2]) | call("sub2", sin, words[4 * i + 3])
                store(wrong, 0, wrong[0] | off)
        # float16 of 2**-7 and more have one of these bits
        far = T.cast(wrong[0] & T.uint32(0x60006000), "int32")
        with T.If(T.Or(turn == 0, call("any", far) != 0)), T.Then():
            self._share_angles(block)
        call("sync_warp")
        query = registers(4, "uint32")
        for i in range(self.couples):
            couple = let(i * 32 + self.warp.lane)
            with T.If(couple < case.size // 4), T.Then():
                cos, sin = words[4 * i], words[4 * i + 1]
                for row in range(0, case.row_stride, 2):
                    place = self.own + self._fragment(row, couple)
                    call("copy16", address(query, 0), address(self.shared, layout.query + place))
                    new: list[Expr] = []
                    for e in range(2):
                        second, first = self._turned(query[2 * e + 1], query[2 * e], cos, sin)
                        new += first, second
                    call("write16", address(self.shared, layout.fragment + place), *new)
        call("sync_warp")

    def _turned(self, x: Expr, y: Expr, cos: Expr, sin: Expr) -> tuple[Expr, Expr]:
        return (
            call("fnma2", y, sin, call("mul2", x, cos)),
            call("fma2", x, sin, call("mul2", y, cos)),
        )

    def _share_angles(self, block: Expr) -> None:
        """Lay out the rotations of the block's tokens relative to its last one's."""
        threads, couples = self.layout.heads * 32, self.case.size // 4
        call("sync_threads", self.sub + 1, T.int32(threads))
        own = let(self.thread - self.sub * threads)
        last, words = registers(2, "uint32"), registers(2, "uint32")
        with T.serial(0, -(-BLOCK * couples // threads)) as i:
            piece = let(i * threads + own)
            with T.If(piece < BLOCK * couples), T.Then():
                token, couple = let(piece // couples), let(piece % couples)
                call("copy8", address(last, 0), self._rotation(block, BLOCK - 1, couple))
                call("copy8", address(words, 0), self._rotation(block, token, couple))
                parts: list[list[Expr]] = [[], []]
                for e in range(2):
                    cos, sin, to_cos, to_sin = (
                        call("float_f16", word >> T.uint32(16) if e else word)
                        for word in (words[0], words[1], last[0], last[1])
                    )
                    norm = T.max(to_cos * to_cos + to_sin * to_sin, T.float32(1e-12))
                    parts[0].append((cos * to_cos + sin * to_sin) / norm)
                    parts[1].append((sin * to_cos - cos * to_sin) / norm)
                both = [call("pack_f16", *part) for part in parts]
                place = self.angles + token * self.layout.row + couple * 8
                call("write8", address(self.shared, place), *both)
        call("sync_threads", self.sub + 1, T.int32(threads))

    def _key_scale(self, block: Expr) -> None:
        """Keep scale and zero of the block's group in shared memory, four pairs of them a lane."""
        a, case, warp = self.a, self.case, self.warp
        group = let(T.if_then_else(a.group > 0, block // T.max(a.group, 1), 0))
        with T.If(group != self.place[0]), T.Then():
            store(self.place, 0, group)
            line = self.batch * a.key_batch * case.heads + self.head
            base = let(wide(line * a.key_groups + group) * case.size)
            call("sync_warp")
            for i in range(-(-case.size // 128)):
                couple = let(i * 32 + warp.lane)
                with T.If(couple < case.size // 4), T.Then():
                    words = [
                        call("read4", address(x, base + wide(2 * couple + half)))
                        for x in (a.key_scale, a.key_zero)
                        for half in (0, case.size // 2)
                    ]
                    call("write16", address(self.shared, self.own + couple * 16), *words)
            call("sync_warp")

    def _scores(self) -> None:
        """Products of the block's keys, two pairs of channels of four tokens at a time."""
        case, warp, layout = self.case, self.warp, self.layout
        scale = registers(4, "uint32")
        turn = registers(2, "uint32")
        row = let(self.angles + warp.g * layout.row + warp.q * 8)
        own = let(warp.g % min(8, case.row_stride))
        fragment = let(self.own + layout.fragment + self._fragment(own, warp.q))
        query = registers(2 * case.tiles, "uint32")
        for step in range(case.size // 16):
            place = self.own + (step * 4 + warp.q) * 16
            call("copy16", address(scale, 0), address(self.shared, place))
            for tile in range(case.tiles):
                place = fragment + (4 * tile * layout.two_rows + step * 64)
                call("copy8", address(query, 2 * tile), address(self.shared, place))
            operand: list[list[Expr]] = [[], []]
            for i in range(4):
                pair = (step * 4 + i) * 2
                first, second = (
                    call("fma2", self._look_up("key", self.keys, pair + h), scale[h], scale[2 + h])
                    for h in range(2)
                )
                if case.rotated:
                    at = row + (8 * i * layout.row + step * 32)
                    call("copy8", address(turn, 0), address(self.shared, at))
                    first, second = self._turned(first, second, let(turn[0]), let(turn[1]))
                operand[0].append(first)
                operand[1].append(second)
            for half in range(2):
                words = [operand[h][2 * half + i] for h in range(2) for i in range(2)]
                self.flash.add_scores("float16", half, words, query, 0)

    def _begin_scores(self) -> None:
        """Set the scores to the outliers' part."""
        case, warp, flash = self.case, self.warp, self.flash
        for tile in range(case.tiles):
            row = let((8 * tile + 2 * warp.q) % case.row_stride)
            for i in range(4):
                place = (row // 4 * BLOCK + 8 * i + warp.g) * 16 + row % 4 * 4
                place = self.own + self.layout.tile + place
                scores = address(flash.scores, tile * 8 + i * 2)
                call("copy8", scores, address(self.shared, place))

    def _finish_score(self, tile: int, i: int, e: int) -> None:
        """Scale, cap; to units of log 2."""
        at = tile * 8 + i * 2 + e
        score = self.flash.scores[at] * self.row_scale[tile * 2 + e]
        if self.case.softcap:
            score = self._capped(score) * T.float32(LOG2E)
        store(self.flash.scores, at, score)
