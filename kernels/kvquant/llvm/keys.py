"""Scores of packed keys in 16-bit fixed point, for x86.

A channel's 16 (8, 4) possible values zero + scale * level become a table of int16, one unit a
rotation pair, which is folded into the query; so rotating takes rounding multiplications (cosines
as Q14, which halves the result) and the score is a sum of products of int16 pairs in int32. The
query's unit keeps every sum below 2**31, whatever the codes are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.llvm.simd import (
    X86,
    Expr,
    Floats,
    Registers,
    fill,
    get,
    load,
    local,
    loop,
    prefetch,
    put,
    repeat,
    shuffle,
    store,
    turn,
)

TOKENS = 32
LIMIT = {True: 90000.0, False: 45000.0}
"""Bound of the sum over pairs of the query's int16 norms; 2**31 / 23170 rotated, / 46340 not."""


@dataclass(frozen=True)
class FixedKeys:
    """Keys of head size ``size`` in ``bits`` bits, scored for tiles of ``rows`` query rows."""

    machine: X86
    size: int
    bits: int
    rows: int
    rotated: bool

    @property
    def pairs(self) -> int:
        return self.size // 2

    @property
    def table(self) -> tuple[str, int]:
        """What a channel's table is made of."""
        return "uint8", 32

    @property
    def query(self) -> tuple[str, int]:
        """What a query row is made of."""
        return "int32", self.pairs

    def scratch(self) -> Any:
        """A block of keys, int16 pairs [pairs, vectors of tokens]."""
        vectors = TOKENS // self.machine.lanes
        return local((self.pairs, vectors, self.machine.lanes), "int32")

    def prepare(
        self,
        levels: Any,
        key_scale: Any,
        key_zero: Any,
        at: tuple[Expr, ...],
        query: Any,
        tables: Any,
        fixed: Any,
        units: Any,
        where: tuple[Expr, ...],
        rows: Expr,
        attention_scale: Expr,
    ) -> None:
        """Fill the tables [*where, D, 32] bytes, the query in int16 pairs [*where, rows, D / 2] and
        the value of a unit of its scores [*where, rows], for scale and zero [*at, D].

        levels: float32 [16]; query: a function of (row, channel, lanes).
        """
        f16, f8 = Floats(16), Floats(8)
        pair_unit = local((self.pairs,))
        table = load(levels, 0, lanes=16)
        with loop(self.pairs) as pair:
            channels = (pair, pair + self.pairs)
            values, largest = [], None
            for channel in channels:
                scale = T.Cast("float32", get(key_scale, *at, channel))
                zero = T.Cast("float32", get(key_zero, *at, channel))
                values.append(f16.fma(table, f16.of(scale), f16.of(zero)))
                size = f16.largest(f16.abs(values[-1]))
                largest = size if largest is None else T.max(largest, size)
            unit = T.Bind(T.max(largest, T.float32(1e-30)) * T.float32(1 / 32767))
            put(pair_unit, unit, pair)
            for channel, value in zip(channels, values, strict=True):
                scaled = f16.round(value * f16.of(T.float32(1) / unit))
                words = T.Bind(T.Cast("int32x16", scaled))
                if self.machine.wide:
                    entries = T.reinterpret("uint8x32", T.Cast("int16x16", words))
                    store(tables, entries, *where, channel, 0, lanes=32)
                else:
                    low = T.Cast("uint8x16", T.bitwise_and(words, fill(255, "int32", 16)))
                    high = T.bitwise_and(T.shift_right(words, fill(8, "int32", 16)),
                                         fill(255, "int32", 16))  # fmt: skip
                    store(tables, low, *where, channel, 0, lanes=16)
                    store(tables, T.Cast("uint8x16", high), *where, channel, 16, lanes=16)
        with loop(rows) as row:
            total, largest_norm = Registers(1, "float32", 8), Registers(1, "float32", 8)

            def both(pair: Expr, row: Expr = row) -> tuple[Expr, Expr]:
                unit = load(pair_unit, pair, lanes=8)
                first, second = query(row, pair, 8), query(row, pair + self.pairs, 8)
                return T.Bind(first * unit), T.Bind(second * unit)

            with loop(self.pairs // 8) as i:
                a, b = both(i * 8)
                norm = f8.sqrt(f8.fma(a, a, b * b))
                total[0] = total[0] + norm
                largest_norm[0] = f8.max(largest_norm[0], norm)
            factor = T.min(
                T.float32(LIMIT[self.rotated]) / T.max(f8.total(total[0]), T.float32(1e-30)),
                T.float32(32000) / T.max(f8.largest(largest_norm[0]), T.float32(1e-30)),
            )
            factor = T.Bind(factor)
            with loop(self.pairs // 8) as i:
                a, b = (f8.round(x * f8.of(factor)) for x in both(i * 8))
                low = T.bitwise_and(T.Cast("int32x8", a), fill(0xFFFF, "int32", 8))
                high = T.shift_left(T.Cast("int32x8", b), fill(16, "int32", 8))
                store(fixed, T.bitwise_or(low, high), *where, row, i * 8, lanes=8)
            unit = attention_scale * T.float32(2 if self.rotated else 1) / factor
            put(units, unit, *where, row)

    def unpack(
        self,
        codes: Any,
        at: tuple[Expr, ...],
        tables: Any,
        where: tuple[Expr, ...],
        rotation: Any,
        angle: tuple[Expr, ...],
        scratch: Any,
    ) -> None:
        """Fill the scratch with the (rotated) keys of the block codes[*at], cos and sin in
        rotation[*angle]."""
        per_row = {4: 1, 2: 2, 3: 4}[self.bits]
        ahead = (at[0], at[1] + 1, at[2])
        with loop(self.pairs // per_row) as i:
            prefetch(codes, *ahead, i * per_row * TOKENS * self.bits // 4)
            index = self._indices(codes, at, i)
            for k in range(per_row):
                pair = T.Bind(i * per_row + k)
                first = self._values(index(2 * k), tables, where, pair)
                second = self._values(index(2 * k + 1), tables, where, pair + self.pairs)
                for v, (a, b) in enumerate(zip(first, second, strict=True)):
                    if self.rotated:
                        a, b = self._rotate(a, b, rotation, angle, pair, v)
                    for side, words in enumerate(self.machine.interleave(a, b, 16)):
                        lanes = self.machine.lanes
                        value = T.reinterpret(f"int32x{lanes}", words)
                        store(scratch, value, pair, 2 * v + side, 0, lanes=lanes)

    def _indices(self, codes: Any, at: tuple[Expr, ...], i: Expr) -> Any:
        """The codes of the k-th channel of step i, as bytes or (wide) words of vectors."""
        m = self.machine

        def row(number: Expr) -> Expr:
            data = load(codes, *at, number * TOKENS, lanes=TOKENS)
            if m.wide:
                return T.Bind(T.reinterpret("int32x16", T.Cast("uint16x32", data)))
            words = T.reinterpret("int64x4", data)
            return T.Bind(T.reinterpret("int32x8", shuffle([words], (0, 2, 1, 3))))

        width, repeat = 16, 0x10001 if m.wide else 0x1010101
        if self.bits != 3:
            data, mask = row(i), (2**self.bits - 1) * repeat

            def plain(k: int) -> Expr:
                shifted = m.shift_right(data, self.bits * k, width)
                return shifted if m.wide else m.mask(shifted, mask)

            return plain
        low = [row(i * 2), row(i * 2 + 1)]
        high = row(self.size // 4 + i)

        def planes(k: int) -> Expr:
            bottom = m.mask(m.shift_right(low[k // 4], 2 * (k % 4), width), 3 * repeat)
            if k < 2:
                left = fill(2 - k, "int32", m.lanes)
                top = m.mask(T.shift_left(high, left), 4 * repeat)
            else:
                top = m.mask(m.shift_right(high, k - 2, width), 4 * repeat)
            return T.Bind(T.bitwise_or(bottom, top))

        return planes

    def _values(self, index: Expr, tables: Any, where: Any, channel: Expr) -> tuple[Expr, ...]:
        """Vectors of int16 of the block's tokens, in order."""
        m = self.machine
        if m.wide:
            table = load(tables, *where, channel, 0, lanes=32)
            table = repeat(T.reinterpret("int16x16", table), 16, 2)
            return (m.look_up_words(table, T.reinterpret("int16x32", index)),)
        half = [repeat(load(tables, *where, channel, start, lanes=16), 16, 2) for start in (0, 16)]
        low, high = (m.look_up_bytes(table, index) for table in half)
        return tuple(T.Bind(T.reinterpret("int16x16", x)) for x in m.interleave(low, high, 8))

    def _rotate(
        self, a: Expr, b: Expr, rotation: Any, angle: tuple[Expr, ...], pair: Expr, v: int
    ) -> tuple[Expr, Expr]:
        m, lanes = self.machine, self.machine.lanes * 2
        cos, sin = (
            load(rotation, *angle, turn(pair, side, v * lanes), lanes=lanes) for side in (0, 1)
        )
        first = T.Bind(m.multiply_high(a, cos) - m.multiply_high(b, sin))
        second = T.Bind(m.multiply_high(b, cos) + m.multiply_high(a, sin))
        return first, second

    def score(
        self,
        scratch: Any,
        fixed: Any,
        units: Any,
        where: tuple[Expr, ...],
        row: Expr,
        scores: Any,
        out: tuple[Expr, ...],
        token: Expr,
    ) -> None:
        """scores[*out, row + r, token ..] of the block in the scratch for the rows of a tile."""
        m, floats = self.machine, Floats(self.machine.lanes)
        for v in range(TOKENS // m.lanes // 2):
            sums = Registers(2 * self.rows, "int32", m.lanes)
            with loop(self.pairs // 4) as step:
                for pair in (step * 4 + i for i in range(4)):
                    keys = [load(scratch, pair, 2 * v + side, 0, lanes=m.lanes) for side in (0, 1)]
                    for r in range(self.rows):
                        q = T.Bind(fill(get(fixed, *where, row + r, pair), "int32", m.lanes))
                        for side, key in enumerate(keys):
                            k = 2 * r + side
                            words = T.reinterpret(f"int16x{2 * m.lanes}", key)
                            sums[k] = m.dot_pairs(sums[k], words, q)
            for r in range(self.rows):
                unit = floats.of(get(units, *where, row + r))
                for side, ints in enumerate(m.in_order(sums[2 * r], sums[2 * r + 1])):
                    value = T.Cast(floats.dtype, ints) * unit
                    at = token + (2 * v + side) * m.lanes
                    store(scores, value, *out, row + r, at, lanes=m.lanes)
