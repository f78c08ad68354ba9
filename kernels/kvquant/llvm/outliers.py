"""Sparse outliers of a block and head, added to its scores and to the sums of its values.

An entry serves the four rows of a tile at once: queries, scores, weights and sums are kept with
rows innermost, and are transposed from and to the dense layout once a step of the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.llvm.simd import (
    Expr,
    Floats,
    get,
    load,
    local,
    loop,
    opaque,
    prefetch,
    put,
    shuffle,
    store,
    turn,
)

TOKENS, ROWS, SPAN = 32, 4, 256
FOUR, EIGHT = Floats(4), Floats(8)


@dataclass(frozen=True)
class Outliers:
    """The outliers of keys (queries: float32 [heads, tiles, D, 8] of a task) and of values.

    A query row is followed by the row that meets the sine: the partner channels, with their sign.
    """

    size: int
    value_size: int
    rows: int
    rotated: bool

    def turn(self, q: Any, scale: Expr, queries: Any, where: tuple[Expr, ...], row: Expr) -> None:
        """Fill queries[*where] with a tile of rows q(row, channel), times scale."""
        half = self.size // 2
        factor = T.Bind(scale * T.float32(2**-14 if self.rotated else 1))
        with loop(half) as pair:
            for r in range(self.rows):
                first = T.Bind(q(row + r, pair) * factor)
                second = T.Bind(q(row + r, pair + half) * factor)
                put(queries, first, *where, pair, r)
                put(queries, second, *where, pair, ROWS + r)
                put(queries, second, *where, pair + half, r)
                put(queries, -first, *where, pair + half, ROWS + r)

    def add_to_scores(
        self,
        entries: Any,
        offsets: Any,
        at: tuple[Expr, Expr],
        head: Expr,
        count: Expr,
        rotation: Any,
        angle: Expr,
        queries: Any,
        where: tuple[Expr, ...],
        scores: Any,
        out: tuple[Expr, ...],
    ) -> None:
        """scores[*out, row, token] += residual * query, in count blocks from at = (b, block) on."""
        extra = local((SPAN, ROWS))
        with loop(count * TOKENS // 2) as i:
            store(extra, EIGHT.of(0.0), i * 2, 0, lanes=8)

        def add(block: Expr, j: Expr, token: Expr, channel: Expr, value: Expr) -> None:
            q = load(queries, *where, channel, 0, lanes=4)
            if self.rotated:
                pair = self._pair(channel)
                cos, sin = (
                    T.Cast("float32", get(rotation, angle, block, turn(pair, side, token))) * value
                    for side in (0, 1)
                )
                partner = load(queries, *where, channel, ROWS, lanes=4)
                part = FOUR.fma(q, FOUR.of(cos), partner * FOUR.of(sin))
            else:
                part = q * FOUR.of(value)
            place = T.Bind(j * TOKENS + token)
            store(extra, load(extra, place, 0, lanes=4) + part, place, 0, lanes=4)

        self._each(entries, offsets, at, head, count, add)
        self._add_transposed(extra, count * (TOKENS // 8), scores, out)

    def add_to_sums(
        self,
        entries: Any,
        offsets: Any,
        at: tuple[Expr, Expr],
        head: Expr,
        count: Expr,
        weights: Any,
        where: tuple[Expr, ...],
        sums: Any,
        out: tuple[Expr, ...],
    ) -> None:
        """sums[*out, row, channel] += residual * weights[*where, row, token]."""
        turned, extra = local((SPAN, ROWS)), local((self.value_size, ROWS))
        *outer, row = where
        with loop(count * (TOKENS // 8)) as i:
            rows = [load(weights, *outer, row + min(r, self.rows - 1), i * 8, lanes=8)
                    for r in range(ROWS)]  # fmt: skip
            for k in range(4):
                order = [8 * r + 2 * k + token for token in (0, 1) for r in range(ROWS)]
                store(turned, shuffle(rows, order), i * 8 + 2 * k, 0, lanes=8)
        with loop(self.value_size // 2) as i:
            store(extra, EIGHT.of(0.0), i * 2, 0, lanes=8)

        def add(block: Expr, j: Expr, token: Expr, channel: Expr, value: Expr) -> None:
            weight = load(turned, j * TOKENS + token, 0, lanes=4)
            total = load(extra, channel, 0, lanes=4)
            store(extra, FOUR.fma(weight, FOUR.of(value), total), channel, 0, lanes=4)

        self._each(entries, offsets, at, head, count, add)
        self._add_transposed(extra, T.int64(self.value_size // 8), sums, out)

    def _pair(self, channel: Expr) -> Expr:
        half = self.size // 2
        if half & (half - 1) == 0:
            return T.Bind(T.bitwise_and(channel, T.int64(half - 1)))
        return T.Bind(channel - T.Cast("int64", channel >= T.int64(half)) * half)

    def _each(
        self, entries: Any, offsets: Any, at: tuple[Expr, Expr], head: Expr, count: Expr, add: Any
    ) -> None:
        b, start = at
        with loop(count) as j:
            block = T.Bind(start + j)
            begin, end = (
                opaque(T.Cast("int64", get(offsets, b, block, head + side))) for side in (0, 1)
            )
            for line in range(3):
                prefetch(entries, b, block, end + 16 * line)
            with loop(end, begin) as i:
                entry = T.Bind(get(entries, b, block, i))
                token = T.Bind(T.Cast("int64", T.shift_right(entry, T.int32(24))))
                channel = T.bitwise_and(T.shift_right(entry, T.int32(16)), T.int32(255))
                half = T.reinterpret("float16", T.Cast("uint16", entry))
                value = T.Bind(T.Cast("float32", half))
                add(block, j, token, T.Bind(T.Cast("int64", channel)), value)

    def _add_transposed(self, extra: Any, groups: Expr, target: Any, out: tuple[Expr, ...]) -> None:
        *outer, row = out
        with loop(groups) as i:
            parts = [load(extra, i * 8 + 2 * k, 0, lanes=8) for k in range(4)]
            for r in range(self.rows):
                at = (*outer, row + r, i * 8)
                values = shuffle(parts, [4 * n + r for n in range(8)])
                store(target, load(target, *at, lanes=8) + values, *at, lanes=8)
