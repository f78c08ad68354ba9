"""The k largest of many numbers, by insertion."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.llvm.simd import Expr, call, fill, get, local, loop, put

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

    def takes(self, value: Expr, lanes: int = 1) -> Expr:
        least = self.least if lanes == 1 else fill(self.least, "float32", lanes)
        return value >= least if self.latest else value > least

    def insert(self, value: Expr, place: Expr) -> None:
        with T.If(self.takes(value)), T.Then():
            at = local((1,), "int64")
            put(at, T.int64(self.k - 1), 0)

            def previous(buffer: Any) -> Expr:
                return get(buffer, T.max(at[0] - 1, T.int64(0)))

            above = previous(self.values)
            passes = value >= above if self.latest else value > above
            with T.While(T.And(at[0] > T.int64(0), passes)):
                for buffer in (self.values, self.places):
                    put(buffer, previous(buffer), at[0])
                put(at, at[0] - 1, 0)
            put(self.values, value, at[0])
            put(self.places, T.Cast("int32", place), at[0])


def any_lane(condition: Expr, lanes: int) -> Expr:
    return call("bool", f"llvm.vector.reduce.or.v{lanes}i1", condition)
