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
    prefetch,
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
                steps = TOKENS * self.width // 32
                with loop(steps) as step:
                    for v in range(self.vectors):
                        line = (step * self.size + channel + v * m.lanes) * 4
                        prefetch(codes, at[0], at[1] + 1, block + j, line)
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
        """(number of a pair of tokens, its int16 pairs by vectors of channels) of a step's words.

        A look-up of the bytes of a word serves two pairs.
        """
        m, width = self.machine, self.width
        per, lows = 16 // width, self._words(codes, at, channel, step)
        highs = [None] * self.vectors
        if self.bits == 3:
            moved = T.Bind(fill(T.Cast("int32", step * 8), "int32", m.lanes))
            words = self._words(codes, at, channel, T.int64(2))
            highs = [self._spread(T.Bind(T.shift_right(word, moved))) for word in words]
        for i in range(per // 2):
            found = []
            for low, high in zip(lows, highs, strict=True):
                index = m.mask(m.shift_right(low, width * i, 16), (2**width - 1) * 0x1010101)
                if high is not None:
                    third = m.shift_right(high, i, 16)
                    index = T.bitwise_or(index, m.mask(third, 0x4040404))
                bytes_found = m.look_up_bytes(levels, index)
                found.append(T.Bind(T.reinterpret(f"int32x{m.lanes}", bytes_found)))
            first = step * per + i
            yield first, [m.mask(u, 0xFF00FF) for u in found]
            yield first + per // 2, [m.shift_right(u, 8, 16) for u in found]

    @property
    def width(self) -> int:
        """Bits of a code in the first plane."""
        return 2 if self.bits == 3 else self.bits

    def _words(self, codes: Any, at: tuple[Expr, ...], channel: Expr, group: Expr) -> list[Expr]:
        m = self.machine
        starts = [(group * self.size + channel + v * m.lanes) * 4 for v in range(self.vectors)]
        data = [load(codes, *at, start, lanes=m.bits // 8) for start in starts]
        return [T.Bind(T.reinterpret(f"int32x{m.lanes}", x)) for x in data]

    def _spread(self, word: Expr) -> Expr:
        """Bits 0 to 3 of each 16 as bits 2 to 5 of their low byte, 4 to 7 of their high byte."""
        m = self.machine
        low = T.shift_left(m.mask(word, 0xF000F), fill(2, "int32", m.lanes))
        high = T.shift_left(m.mask(word, 0xF000F0), fill(6, "int32", m.lanes))
        return T.Bind(T.bitwise_or(low, high))
