"""Systems of linear equations."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from regraft.frontends.export.builder import FLOAT, INT, Builder, lowers, rank


@lowers("aten.linalg_solve_triangular")
def solve(b: Builder, a: ir.Value, y: ir.Value, *, upper: bool, left: bool = True,
          unitriangular: bool = False, out: Any = None) -> Any:  # fmt: skip
    if rank(a) != rank(y):
        raise NotImplementedError("triangular systems of other dimensions than their results")
    last = [*range(rank(a) - 2), rank(a) - 1, rank(a) - 2]
    if not left:
        a, y, upper = b.transpose(a, *last), b.transpose(y, *last), not upper
    made = b.call("SolveTriangular", _solve, a, y, upper=upper, unit=unitriangular)
    return made if left else b.transpose(made, *last)


def _solve(b: Builder, a: ir.Value, y: ir.Value, upper: bool, unit: bool) -> ir.Value:
    """x of a x = y, row by row: a [..., n, n] triangular, y [..., n, m]."""
    count = rank(a)
    front = [count - 2, *range(count - 2), count - 1]
    size = b.size(a, count - 2)
    square = b.op("Concat", size, size, axis=0)
    ones = b.op("EyeLike", b.op("Expand", b.constant(0.0, FLOAT), square))
    items = [b.transpose(a, *front), b.transpose(y, *front), b.op("CastLike", ones, a)]
    if upper:
        back, end = b.constant([-1]), b.constant([-(2**63 - 1)])
        items = [b.op("Slice", x, back, end, b.constant([0]), back) for x in items]

    def row(inner: Builder, x: ir.Value, own: ir.Value, want: ir.Value, one: ir.Value) -> Any:
        """x has the rows so far, zeros for the others; one is 1 for this row."""
        known = inner.squeeze(inner.op("MatMul", inner.unsqueeze(own, -2), x), -2)
        rest = inner.op("Sub", want, known)
        if not unit:
            pivot = inner.op("ReduceSum", inner.op("Mul", own, one), inner.constant([-1]))
            rest = inner.op("Div", rest, pivot)
        placed = inner.op("Mul", inner.unsqueeze(rest, -2), inner.unsqueeze(one, -1))
        return [inner.op("Add", x, placed)]

    empty = b.op("Expand", b.op("CastLike", b.constant(0.0, FLOAT), y), b.op("Shape", y, dtype=INT))
    (made,) = b.scan(row, [empty], items)
    made.shape = y.shape
    return made
