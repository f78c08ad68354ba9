"""The k largest of many numbers, by insertion."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.llvm.simd import Expr, call, get, local, loop, put, shuffle, store

NOWHERE = 2**31 - 1


class Largest:
    """The k largest of the float32 inserted so far and their places, the largest first.

    Of equal ones the first inserted stay, with ``latest`` the last.
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
        return get(self.values, self.k - 1)

    def place(self, i: Expr) -> Expr:
        """NOWHERE where fewer than i + 1 were taken."""
        return T.Bind(get(self.places, i))

    def insert(self, value: Expr, place: Expr) -> None:
        with T.If(self._passes(value, self.least)), T.Then():
            at = local((1,), "int64")
            put(at, T.int64(self.k - 1), 0)

            def previous(buffer: Any) -> Expr:
                return get(buffer, T.max(at[0] - 1, T.int64(0)))

            above = previous(self.values)
            with T.While(T.And(at[0] > T.int64(0), self._passes(value, above))):
                for buffer in (self.values, self.places):
                    put(buffer, previous(buffer), at[0])
                put(at, at[0] - 1, 0)
            put(self.values, value, at[0])
            put(self.places, T.Cast("int32", place), at[0])

    def _passes(self, value: Expr, kept: Expr) -> Expr:
        return value >= kept if self.latest else value > kept


def any_lane(condition: Expr, lanes: int) -> Expr:
    return call("bool", f"llvm.vector.reduce.or.v{lanes}i1", condition)


def bound(vectors: list[Expr], k: int) -> Expr:
    """What k of the lanes of these float32x8 at least are; the k-th largest of a single vector."""
    rank = -(-k // len(vectors))
    if rank > 8:
        return T.float32(-float("inf"))
    kept = local((8,))
    least = _sorted(vectors[0])
    for vector in vectors[1:]:
        least = T.Bind(T.min(least, _sorted(vector)))
    store(kept, least, 0, lanes=8)
    return T.Bind(get(kept, 8 - rank))


def _sorted(x: Expr) -> Expr:
    """The lanes of float32x8 in ascending order, by a bitonic network."""
    for size, stride in ((2, 1), (4, 2), (4, 1), (8, 4), (8, 2), (8, 1)):
        other = shuffle([x], [i ^ stride for i in range(8)])
        pair = [T.Bind(T.min(x, other)), T.Bind(T.max(x, other))]
        upper = [bool(i & stride) != bool(i & size) for i in range(8)]
        x = shuffle(pair, [i + 8 * side for i, side in enumerate(upper)])
    return x
