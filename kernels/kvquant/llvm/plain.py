"""Scores of packed keys and weighted sums of packed values on any processor.

The same steps as in ``keys`` and ``values``, with keys in float32 and values in int32, in vectors
that LLVM fits to the processor; table look-ups are loads of one element each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.llvm.simd import (
    Expr,
    Floats,
    Registers,
    fill,
    gather,
    get,
    load,
    local,
    loop,
    put,
    store,
    turn,
)

TOKENS, LANES = 32, 8
FLOATS = Floats(LANES)


def _part(words: Expr, shift: int, bits: int) -> Expr:
    """int32 vector of the codes that begin at bit ``shift`` of int32 words."""
    moved = T.shift_right(words, fill(shift, "int32", LANES)) if shift else words
    return T.bitwise_and(moved, fill(2**bits - 1, "int32", LANES))


@dataclass(frozen=True)
class PlainKeys:
    """The counterpart of FixedKeys."""

    size: int
    bits: int
    rows: int
    rotated: bool

    @property
    def pairs(self) -> int:
        return self.size // 2

    @property
    def table(self) -> tuple[str, int]:
        return "float32", 16

    @property
    def query(self) -> tuple[str, int]:
        return "float32", self.size

    def scratch(self) -> Any:
        return local((self.size, TOKENS))

    def prepare(
        self, levels, key_scale, key_zero, at, query, tables, fixed, units, where, rows, scale
    ) -> None:
        table, wide = load(levels, 0, lanes=16), Floats(16)
        with loop(self.size) as channel:
            gain, zero = (
                wide.of(T.Cast("float32", get(x, *at, channel))) for x in (key_scale, key_zero)
            )
            store(tables, wide.fma(table, gain, zero), *where, channel, 0, lanes=16)
        with loop(rows) as row:
            put(units, scale, *where, row)
            with loop(self.size // LANES) as i:
                store(fixed, query(row, i * LANES, LANES), *where, row, i * LANES, lanes=LANES)

    def unpack(self, codes, at, tables, where, rotation, angle, scratch) -> None:
        per_row = {4: 1, 2: 2, 3: 4}[self.bits]
        top = self.size // 4
        with loop(self.pairs // per_row) as i, loop(TOKENS // LANES) as v:

            def row(number: Expr) -> Expr:
                data = load(codes, *at, number * TOKENS + v * LANES, lanes=LANES)
                return T.Bind(T.Cast(f"int32x{LANES}", data))

            def index(k: int) -> Expr:
                if self.bits != 3:
                    return _part(row(i), self.bits * k, self.bits)
                bottom = _part(row(i * 2 + k // 4), 2 * (k % 4), 2)
                high = T.shift_left(_part(row(top + i), k, 1), fill(2, "int32", LANES))
                return T.bitwise_or(bottom, high)

            for k in range(per_row):
                pair = T.Bind(i * per_row + k)
                a = gather(tables, (*where, pair), T.Bind(index(2 * k)), LANES)
                b = gather(tables, (*where, pair + self.pairs), T.Bind(index(2 * k + 1)), LANES)
                if self.rotated:
                    cos, sin = (
                        T.Cast(
                            FLOATS.dtype,
                            load(rotation, *angle, turn(pair, side, v * LANES), lanes=LANES),
                        )
                        * FLOATS.of(2.0**-14)
                        for side in (0, 1)
                    )
                    a, b = T.Bind(a * cos - b * sin), T.Bind(b * cos + a * sin)
                store(scratch, a, pair, v * LANES, lanes=LANES)
                store(scratch, b, pair + self.pairs, v * LANES, lanes=LANES)

    def score(self, scratch, fixed, units, where, row, scores, out, token) -> None:
        with loop(TOKENS // LANES) as v:
            sums = Registers(self.rows, "float32", LANES)
            with loop(self.size) as channel:
                key = load(scratch, channel, v * LANES, lanes=LANES)
                for r in range(self.rows):
                    q = FLOATS.of(get(fixed, *where, row + r, channel))
                    sums[r] = FLOATS.fma(key, q, sums[r])
            for r in range(self.rows):
                value = sums[r] * FLOATS.of(get(units, *where, row + r))
                store(scores, value, *out, row + r, token + v * LANES, lanes=LANES)


@dataclass(frozen=True)
class PlainValues:
    """The counterpart of FixedValues."""

    size: int
    bits: int
    rows: int

    def accumulate(self, codes, at, block, blocks, table, weights, finish) -> None:
        plane, ints = 8 * self.size, f"int32x{LANES}"
        width = 2 if self.bits == 3 else self.bits
        per = 16 // width
        with loop(self.size // LANES) as group:
            channel = T.Bind(group * LANES)
            sums = Registers(self.rows, "int32", LANES)
            with loop(blocks) as j, loop(TOKENS // (2 * per)) as step:
                place = (*at, block + j)
                start = (step * self.size + channel) * 4
                words = T.reinterpret(ints, load(codes, *place, start, lanes=4 * LANES))
                words = T.Bind(words)
                if self.bits == 3:
                    high = load(codes, *place, channel * 4 + plane, lanes=4 * LANES)
                    move = T.broadcast(T.Cast("int32", step * per), LANES)
                    high = T.Bind(T.shift_right(T.reinterpret(ints, high), move))
                for k in range(per):
                    for side in (0, 1):
                        index = _part(words, 16 * side + width * k, width)
                        if self.bits == 3:
                            third = _part(high, 16 * side + k, 1)
                            index = index + T.shift_left(third, fill(2, "int32", LANES))
                        level = T.Cast(ints, gather(table, (), T.Bind(index), LANES))
                        for r in range(self.rows):
                            pair = get(weights, r, j * (TOKENS // 2) + step * per + k)
                            left = T.shift_left(pair, T.int32(16 * (1 - side)))
                            weight = T.Bind(T.shift_right(left, T.int32(16)))
                            sums[r] = sums[r] + T.Bind(level) * fill(weight, "int32", LANES)
            for r in range(self.rows):
                finish(r, channel, sums[r])
