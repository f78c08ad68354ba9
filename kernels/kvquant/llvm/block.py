"""A block of 32 tokens that is quantised and packed: what keys and values share.

Numbers are the reference's, bit for bit: the same operations on float32 in the same order, none of
them fused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.llvm.in_turn import FLOATS, LANES, TOKENS, Turns
from regraft.kernels.kvquant.llvm.simd import (
    Expr,
    divided,
    fill,
    get,
    load,
    local,
    loop,
    opaque,
    put,
    store,
    unfused,
)

HALF_MAX = 65504.0


@dataclass(frozen=True)
class Shape:
    """What a kernel is generated for; count: outliers of a token at most."""

    kind: str
    heads: int
    size: int
    bits: int
    count: int
    feedback: bool

    @property
    def width(self) -> int:
        """Channels of a token, in all heads."""
        return self.heads * self.size


class Block(ABC):
    """One block; scale, zero and divisor (the scale, 1 for 0) are kept as float32."""

    def __init__(self, shape: Shape, a: Any, task: Expr, scales: int) -> None:
        self.shape, self.a = shape, a
        self.b, self.block = divided(task, a.blocks)
        self.first = T.Bind(self.block * TOKENS)
        self.scale, self.zero, self.divisor = (local((scales,)) for _ in range(3))
        self.midpoints = [T.Bind(get(a.midpoints, i)) for i in range(2**shape.bits - 1)]
        self.levels = [
            T.Bind(T.Cast("float32", get(a.levels, i)) * a.unit) for i in range(2**shape.bits)
        ]
        self.used = local((1,), "int64")
        put(self.used, T.int64(0), 0)
        self.coded = local((TOKENS, shape.size), "int32")
        if shape.feedback:
            self.turns = Turns(self)

    @abstractmethod
    def affine(self, buffer: Any, head: Expr, token: Expr, channel: Expr) -> Expr:
        """Scale, zero or divisor of a vector of channels of a token."""

    def x(self, head: Expr, token: Expr, channel: Expr, lanes: int = LANES) -> Expr:
        return load(self.a.x, self.b, head, self.first + token, channel, lanes=lanes)

    def normalised(self, head: Expr, token: Expr, channel: Expr) -> Expr:
        at = (head, token, channel)
        centred = T.Bind(self.x(*at) - self.affine(self.zero, *at))
        return T.Bind(centred / self.affine(self.divisor, *at))

    def code(self, head: Expr) -> None:
        """Write the head's codes to ``coded``, [token, channel]."""
        if self.shape.feedback:
            return self.turns.code(head)
        with loop(TOKENS) as token, loop(self.shape.size // LANES) as i:
            codes = self.codes(self.normalised(head, token, i * LANES))
            store(self.coded, codes, token, i * LANES, lanes=LANES)

    def codes_of(self, token: Expr, channel: Expr) -> Expr:
        return load(self.coded, token, channel, lanes=LANES)

    def codes(self, y: Expr) -> Expr:
        """int32: how many midpoints lie below normalised values."""
        below = (T.Cast(FLOATS.ints, FLOATS.of(midpoint) < y) for midpoint in self.midpoints)
        total = local((LANES,), "int32")
        store(total, sum(below, next(below)), 0, lanes=LANES)
        return load(total, 0, lanes=LANES)

    def read(self, y: Expr) -> Expr:
        """The levels of normalised values' codes."""
        level = local((LANES,))
        value = FLOATS.of(self.levels[0])
        for midpoint, above in zip(self.midpoints, self.levels[1:], strict=True):
            value = T.Select(FLOATS.of(midpoint) < y, FLOATS.of(above), value)
        store(level, value, 0, lanes=LANES)
        return load(level, 0, lanes=LANES)

    def error(self, y: Expr, head: Expr, token: Expr, channel: Expr) -> Expr:
        """Values less what their codes read as."""
        at = (head, token, channel)
        product = unfused(self.read(y) * self.affine(self.scale, *at), LANES)
        return T.Bind(self.x(*at) - (product + self.affine(self.zero, *at)))

    def set_scale(self, i: Expr, scale: Expr, zero: Expr) -> None:
        """Keep float16 scale and zero at place i."""
        wide = T.Bind(T.Cast("float32", scale))
        put(self.scale, wide, i)
        put(self.zero, T.Cast("float32", zero), i)
        put(self.divisor, T.Select(wide == T.float32(0), T.float32(1), wide), i)

    def vectors(self, visit: Callable[[Expr, Expr, Expr], None]) -> None:
        """visit(head, channel, flat channel) of each vector."""
        with loop(self.shape.heads) as head, loop(self.shape.size // LANES) as i:
            visit(head, i * LANES, T.Bind(head * self.shape.size + i * LANES))

    def start_head(self, head: Expr) -> None:
        put(self.a.offsets, T.Cast("int32", self.used[0]), self.b, self.block, head)

    def write_outlier(self, head: Expr, token: Expr, channel: Expr) -> None:
        """The next entry; a residual of 0 needs none."""
        lane = T.Bind(T.bitwise_and(channel, T.int64(LANES - 1)))
        at = (head, token, T.Bind(channel - lane))
        scale, zero, x = local((LANES,)), local((LANES,)), local((LANES,))
        for kept, vector in (
            (scale, self.affine(self.scale, *at)),
            (zero, self.affine(self.zero, *at)),
            (x, self.x(*at)),
        ):
            store(kept, vector, 0, lanes=LANES)
        scale, target = T.Bind(get(scale, lane)), T.Bind(get(x, lane))
        if self.shape.feedback:
            moved = unfused(self.turns.moved(token, channel) * scale)
            target = T.Bind(target + moved)
        code = T.Cast("int64", get(self.coded, token, channel))
        read = unfused(T.Cast("float32", get(self.a.levels, code)) * self.a.unit)
        product = unfused(read * scale)
        residual = T.Bind(target - T.Bind(product + get(zero, lane)))
        clamped = T.min(residual, T.float32(HALF_MAX))
        half = T.Cast("float16", T.max(clamped, T.float32(-HALF_MAX)))
        bits = T.Bind(T.Cast("int32", T.reinterpret("uint16", half)))
        with T.If(T.bitwise_and(bits, T.int32(0x7FFF)) != 0), T.Then():
            place = T.Bind(T.Cast("int32", token * 256 + channel))
            entry = T.shift_left(place, T.int32(16)) + bits
            put(self.a.outliers, entry, self.b, self.block, self.used[0])
            put(self.used, self.used[0] + 1, 0)

    def end_outliers(self) -> None:
        self.start_head(T.int64(self.shape.heads))
        with loop(TOKENS * self.shape.count, opaque(self.used[0])) as i:
            put(self.a.outliers, T.int32(0), self.b, self.block, i)


def plane(codes: Expr, planes: tuple[int, ...], p: int) -> Expr:
    """The bits of codes that plane p holds."""
    if len(planes) == 1:
        return codes
    if p:
        return T.Bind(T.shift_right(codes, fill(sum(planes[:p]), "int32", LANES)))
    return T.Bind(T.bitwise_and(codes, fill(2 ** planes[0] - 1, "int32", LANES)))
