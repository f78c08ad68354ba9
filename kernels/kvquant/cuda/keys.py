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
)
from regraft.kernels.kvquant.cuda.codes import Codes
from regraft.kernels.kvquant.cuda.plan import STAGES
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
        with T.If(self.warp.g < min(8, self.case.row_stride)), T.Then():
            for step in range(steps):
                pair = [self.query[(tile * steps + step) * 2 + i] for i in range(2)]
                place = self._fragment(tile, step * 4 + self.warp.q, self.warp.g)
                call("write8", address(self.shared, place), *pair)

    def _fragment(self, tile: int, couple: Expr, row: Expr) -> Expr:
        """Where the operands of channels 2 * couple and D/2 + 2 * couple lie, 8 bytes a row."""
        rows = min(8, self.case.row_stride)
        place = (tile * (self.case.size // 4) + couple) * rows + row
        return self.own + self.layout.fragment + place * 8

    def _prepare_stages(self, low: Expr) -> None:
        """Where this thread's pieces of a block's rotations come from and go to."""
        a, case, layout = self.a, self.case, self.layout
        self.pieces: list[tuple[Expr, Expr, Expr]] = []
        self.slot = registers(2, "int32")  # of the turn, and of the one to be copied
        first = let(self.sub * (STAGES * layout.stage))
        store(self.slot, 0, first)
        store(self.slot, 1, first)
        if not case.rotated:
            return
        own = let(self.thread - self.sub * (layout.heads * 32))
        origin = let(wide(self.batch * a.table_batch * a.table_capacity + low + self.sub))
        row, count, threads = case.size // 8, 4 * case.size, layout.heads * 32
        for i in range(-(-count // threads)):
            piece = let(own + i * threads)
            source = let(origin * (BLOCK * case.size) + wide(piece * 8))
            place = let(piece // row * layout.row + piece % row * 16)
            self.pieces.append((piece < count, source, place))

    def _next_slot(self, i: int) -> None:
        last = self.sub * (STAGES * self.layout.stage) + (STAGES - 1) * self.layout.stage
        after = self.slot[i] + self.layout.stage
        again = self.slot[i] - (STAGES - 1) * self.layout.stage
        store(self.slot, i, T.if_then_else(self.slot[i] < last, after, again))

    def _stage(self, low: Expr, high: Expr, turn: Expr) -> None:
        """Copy the rotations of a turn's block to shared memory."""
        if self.pieces:
            behind = let(turn * self.layout.blocks)
            inside = low + behind + self.sub < high
            skipped = let(wide(behind) * (BLOCK * self.case.size))
            for wanted, source, place in self.pieces:
                with T.If(T.And(wanted, inside)), T.Then():
                    target = address(self.shared, self.slot[1] + place)
                    call("async16", target, address(self.a.table, source + skipped))
            self._next_slot(1)
        call("async_commit")

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

    def _scores(self, stage: Expr) -> None:
        """Products of the block's keys, two pairs of channels of four tokens at a time."""
        case, warp, layout = self.case, self.warp, self.layout
        scale = registers(4, "uint32")
        turn = registers(2, "uint32")
        row = let(stage + warp.g * layout.row + warp.q * 8)
        rows = min(8, case.row_stride)
        fragment = let(self._fragment(0, warp.q, warp.g % rows))
        query = registers(2 * case.tiles, "uint32")
        for step in range(case.size // 16):
            place = self.own + (step * 4 + warp.q) * 16
            call("copy16", address(scale, 0), address(self.shared, place))
            for tile in range(case.tiles):
                place = fragment + (tile * (case.size // 16) + step) * rows * 32
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
                    cos, sin = let(turn[0]), let(turn[1])
                    first, second = (
                        call("fnma2", second, sin, call("mul2", first, cos)),
                        call("fma2", first, sin, call("mul2", second, cos)),
                    )
                operand[0].append(first)
                operand[1].append(second)
            for half in range(2):
                words = [operand[h][2 * half + i] for h in range(2) for i in range(2)]
                self.flash.add_scores("float16", half, words, query, 0)

    def _begin_scores(self) -> None:
        """Set the scores to the outliers' part."""
        case, warp, flash = self.case, self.warp, self.flash
        words = registers(2, "uint32")
        for tile in range(case.tiles):
            row = let((8 * tile + 2 * warp.q) % case.row_stride)
            for i in range(4):
                place = (row // 4 * BLOCK + 8 * i + warp.g) * 16 + row % 4 * 4
                place = self.own + self.layout.tile + place
                call("copy8", address(words, 0), address(self.shared, place))
                for e in range(2):
                    low, high = words[e], words[e] >> T.uint32(16)
                    score = call("float_f16", low) + call("float_f16", high)
                    store(flash.scores, tile * 8 + i * 2 + e, score)

    def _finish_score(self, tile: int, i: int, e: int) -> None:
        """Scale, cap; to units of log 2."""
        at = tile * 8 + i * 2 + e
        score = self.flash.scores[at] * self.row_scale[tile * 2 + e]
        if self.case.softcap:
            score = self._capped(score) * T.float32(LOG2E)
        store(self.flash.scores, at, score)
