"""Weighted sums of packed values in 16-bit fixed point, for x86.

The levels, raised to start at 0, are bytes that one look-up takes from the codes of tokens t and
t + 1; they meet the pair of weights p[t], p[t + 1] as int16 in one product, summed in int32 over at
most 256 tokens: 255 * 32767 * 256 < 2**31.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.llvm.simd import (
    X86,
    Expr,
    Registers,
    fill,
    get,
    load,
    loop,
    repeat,
)

TOKENS = 32


@dataclass(frozen=True)
class FixedValues:
    """Values of head size ``size`` in ``bits`` bits, weighted for tiles of ``rows`` rows."""

    machine: X86
    size: int
    bits: int
    rows: int

    @property
    def vectors(self) -> int:
        """Vectors of channels that are summed at once."""
        most = 4 if self.machine.wide else 2
        return next(n for n in (most, 2, 1) if self.size % (n * self.machine.lanes) == 0)

    def accumulate(
        self,
        codes: Any,
        at: tuple[Expr, ...],
        block: Expr,
        blocks: Expr,
        table: Any,
        weights: Any,
        finish: Any,
    ) -> None:
        """Sum raised levels of blocks block .. block + blocks - 1 of codes[*at].

        table: uint8 [16]; weights: int16 pairs, int32 [rows, 128]. ``finish(row, channel, sums)``
        takes int32 sums of a vector of channels.
        """
        m = self.machine
        levels = repeat(load(table, 0, lanes=16), 16, m.bits // 128)
        step = self.vectors * m.lanes
        with loop(self.size // step) as group:
            channel = T.Bind(group * step)
            sums = Registers(self.rows * self.vectors, "int32", m.lanes)
            with loop(blocks) as j:
                where = (*at, block + j)
                steps = 1 if self.bits == 3 else TOKENS * self.bits // 32
                with loop(steps) as step:
                    for pair, data in self._pairs(codes, where, channel, levels, step):
                        for r in range(self.rows):
                            weight = get(weights, r, j * (TOKENS // 2) + pair)
                            weight = T.Bind(fill(weight, "int32", m.lanes))
                            for v, words in enumerate(data):
                                k = r * self.vectors + v
                                pairs = T.reinterpret(f"int16x{2 * m.lanes}", words)
                                sums[k] = m.dot_pairs(sums[k], pairs, weight)
            for r in range(self.rows):
                for v in range(self.vectors):
                    finish(r, channel + v * m.lanes, sums[r * self.vectors + v])

    def _pairs(
        self, codes: Any, at: tuple[Expr, ...], channel: Expr, levels: Expr, step: Expr
    ) -> Iterator[tuple[Expr, list[Expr]]]:
        """(number of a pair of tokens, its int16 pairs by vectors of channels) of a block."""
        m = self.machine

        def words(group: Expr) -> list[Expr]:
            count = self.machine.bits // 8
            starts = [(group * self.size + channel + v * m.lanes) * 4 for v in range(self.vectors)]
            data = [load(codes, *at, start, lanes=count) for start in starts]
            return [T.Bind(T.reinterpret(f"int32x{m.lanes}", x)) for x in data]

        def look_up(index: Expr) -> Expr:
            found = m.look_up_bytes(levels, index)
            return T.Bind(T.reinterpret(f"int32x{m.lanes}", found))

        return self._planes(words, look_up) if self.bits == 3 else self._bytes(words, look_up, step)

    def _bytes(self, words: Any, look_up: Any, step: Expr) -> Iterator[tuple[Expr, list[Expr]]]:
        """The look-up of the bytes of a word serves two pairs."""
        m, per, mask = self.machine, 16 // self.bits, (2**self.bits - 1) * 0x1010101
        data = words(step)
        for i in range(per // 2):
            found = [look_up(m.mask(m.shift_right(w, self.bits * i, 16), mask)) for w in data]
            yield step * per + i, [m.mask(u, 0xFF00FF) for u in found]
            yield step * per + (i + per // 2), [m.shift_right(u, 8, 16) for u in found]

    def _planes(self, words: Any, look_up: Any) -> Iterator[tuple[Expr, list[Expr]]]:
        """Two low bits from one plane, the third from another."""
        m, highs = self.machine, words(2)
        for pair in range(TOKENS // 2):
            if pair % 8 == 0:
                lows = words(pair // 8)
            found = []
            for low, high in zip(lows, highs, strict=True):
                if pair < 2:
                    third = T.shift_left(high, fill(2 - pair, "int32", m.lanes))
                else:
                    third = m.shift_right(high, pair - 2, 16)
                index = m.mask(m.shift_right(low, 2 * (pair % 8), 16), 0x30003)
                found.append(look_up(T.bitwise_or(index, m.mask(third, 0x40004))))
            yield pair, found
