"""The k largest of many numbers: a bound, the candidates that reach it, insertion in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.llvm.simd import (
    Expr,
    Registers,
    call,
    fill,
    get,
    load,
    local,
    loop,
    opaque,
    put,
    shuffle,
    store,
)

LANES = 8
NOWHERE = 2**31 - 1


class Candidates:
    """Some of ``most`` float32 and their places, in ascending order."""

    def __init__(self, most: int) -> None:
        room = most + LANES
        self.values, self.places, self.count = local((room,)), local((room,), "int32"), _counter()

    def clear(self) -> None:
        put(self.count, T.int64(0), 0)

    def add(self, values: Expr, place: Expr, condition: Expr) -> None:
        """Take those of a vector, from place on, that meet a condition, without a branch each."""
        one, taken = local((LANES,)), local((LANES,), "int32")
        some = call("bool", f"llvm.vector.reduce.or.v{LANES}i1", condition)
        with T.If(some), T.Then():
            store(one, values, 0, lanes=LANES)
            store(taken, T.Cast(f"int32x{LANES}", condition), 0, lanes=LANES)
            for lane in range(LANES):
                put(self.values, get(one, lane), self.count[0])
                put(self.places, T.Cast("int32", place + lane), self.count[0])
                put(self.count, self.count[0] + T.Cast("int64", get(taken, lane)), 0)

    def pad(self, value: float) -> Expr:
        """Fill the last vector up; its end."""
        length = opaque(self.count[0])
        store(self.values, fill(value, "float32", LANES), length, lanes=LANES)
        return opaque(T.shift_left(T.shift_right(length + 7, T.int64(3)), T.int64(3)))

    def each(self, visit: Callable[[Expr, Expr], None]) -> None:
        """visit(value, place)."""
        with loop(opaque(self.count[0])) as i:
            visit(T.Bind(get(self.values, i)), T.Bind(get(self.places, i)))


class Largest:
    """The k largest of the float32 inserted so far and their places, the largest first.

    Of equal ones the first inserted come first, with ``latest`` the last.
    """

    def __init__(self, k: int, latest: bool = False) -> None:
        self.k, self.latest = k, latest
        self.values, self.places = local((k,)), local((k,), "int32")

    def clear(self, floor: float) -> None:
        """Forget all; what is not above floor is never taken."""
        with loop(self.k) as i:
            put(self.values, T.float32(floor), i)
            put(self.places, T.int32(NOWHERE), i)

    @property
    def least(self) -> Expr:
        """The k-th largest, or the floor."""
        return T.Bind(get(self.values, self.k - 1))

    def insert(self, value: Expr, place: Expr) -> None:
        with T.If(self._passes(value, get(self.values, self.k - 1))), T.Then():
            at = _counter()
            put(at, T.int64(self.k - 1), 0)

            def previous(buffer: Any) -> Expr:
                return get(buffer, T.max(at[0] - 1, T.int64(0)))

            with T.While(T.And(at[0] > T.int64(0), self._passes(value, previous(self.values)))):
                for buffer in (self.values, self.places):
                    put(buffer, previous(buffer), at[0])
                put(at, at[0] - 1, 0)
            put(self.values, value, at[0])
            put(self.places, place, at[0])

    def holds(self, value: Expr, place: Expr, first: int) -> Expr:
        """Whether what was inserted is among the ``first`` largest."""
        least, last = (T.Bind(get(x, first - 1)) for x in (self.values, self.places))
        level = place >= last if self.latest else place <= last
        return T.Or(value > least, T.And(value == least, level))

    def _passes(self, value: Expr, kept: Expr) -> Expr:
        return value >= kept if self.latest else value > kept


def bound(vectors: list[Expr], k: int) -> Expr:
    """What k of the lanes of these float32x8 at least are; the k-th largest of a single vector."""
    rank = -(-k // len(vectors))
    if rank > LANES:
        return T.float32(-float("inf"))
    least = _sorted(vectors[0])
    for vector in vectors[1:]:
        least = T.Bind(T.min(least, _sorted(vector)))
    lanes = local((LANES,))
    store(lanes, least, 0, lanes=LANES)
    return load(lanes, LANES - rank, lanes=1)


def kth(values: Any, length: Expr, k: int) -> Expr:
    """The k-th largest of float32 >= 0, length a multiple of 8; 0 where fewer are above 0.

    Found bit by bit: floats >= 0 are ordered as their bits are.
    """
    bits = local((1,), "int32")
    put(bits, T.int32(0), 0)
    with loop(31) as i:
        bit = T.shift_left(T.int32(1), T.int32(30) - T.Cast("int32", i))
        trial = T.Bind(T.bitwise_or(bits[0], bit))
        least = T.Bind(T.reinterpret("float32", trial))
        reached = count_of(values, length, lambda x: x >= fill(least, "float32", LANES))
        with T.If(reached >= T.int32(k)), T.Then():
            put(bits, trial, 0)
    return T.Bind(T.reinterpret("float32", bits[0]))


def count_of(values: Any, length: Expr, condition: Callable[[Expr], Expr]) -> Expr:
    """How many of the first ``length`` values, a multiple of 8, meet a condition on vectors."""
    total = Registers(1, "int32", LANES)
    with loop(opaque(T.shift_right(length, T.int64(3)))) as i:
        met = T.Cast(f"int32x{LANES}", condition(load(values, i * LANES, lanes=LANES)))
        total[0] = total[0] + met
    return call("int32", f"llvm.vector.reduce.add.v{LANES}i32", total[0])


def _sorted(x: Expr) -> Expr:
    """The lanes of float32x8 in ascending order, by a bitonic network.

    Lanes that are to keep the larger of two are negated, and so keep the smaller like the others.
    """
    flipped = [1.0] * LANES
    for size, stride in ((2, 1), (4, 2), (4, 1), (8, 4), (8, 2), (8, 1)):
        flips = [-1.0 if bool(i & stride) != bool(i & size) else 1.0 for i in range(LANES)]
        x = _times(x, [a * b for a, b in zip(flipped, flips, strict=True)])
        x = T.Bind(T.min(x, -shuffle([x], [i ^ stride for i in range(LANES)])))
        flipped = flips
    return _times(x, flipped)


def _times(x: Expr, signs: list[float]) -> Expr:
    return T.Bind(x * shuffle([T.float32(sign) for sign in signs], list(range(LANES))))


def _counter() -> Any:
    return local((1,), "int64")
