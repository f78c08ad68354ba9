"""Operators that pick or place elements by index."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from regraft.frontends.export.builder import INT, Builder, Size, lowers, rank


@lowers("aten.embedding")
def embedding(b: Builder, weight: ir.Value, index: ir.Value, *_: Any, **__: Any) -> Any:
    return b.op("Gather", weight, index, axis=0)


@lowers("aten.index_select")
def index_select(b: Builder, x: ir.Value, dim: int, index: ir.Value) -> Any:
    return b.op("Gather", x, index, axis=dim)


@lowers("aten.gather")
def gather(b: Builder, x: ir.Value, dim: int, index: ir.Value, **_: Any) -> Any:
    return b.op("GatherElements", x, index, axis=dim)


@lowers("aten.index")
def index(b: Builder, x: ir.Value, indices: list[ir.Value | None]) -> Any:
    """x at integer or boolean tensors; those stand side by side or alone."""
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if any(i.dtype == ir.DataType.BOOL for _, i in given):
        if len(given) != 1:
            raise NotImplementedError("an index of several masks")
        dim, mask = given[0]
        where = b.transpose(b.op("NonZero", mask, dtype=INT), 1, 0)
        if dim:
            raise NotImplementedError("a mask behind the first dimension")
        return b.op("GatherND", x, where)
    if len(given) == 1:
        dim, one = given[0]
        return b.op("Gather", x, one, axis=dim)
    dims = [d for d, _ in given]
    if dims != list(range(dims[0], dims[0] + len(dims))):
        raise NotImplementedError("an index of dimensions that lie apart")
    where = _stacked(b, [i for _, i in given])
    if not dims[0]:
        return b.op("GatherND", x, where)
    order = [*dims, *(d for d in range(rank(x)) if d not in dims)]
    picked = b.op("GatherND", b.transpose(x, *order), where)
    count = max(rank(i) for _, i in given)
    total = count + rank(x) - len(dims)
    back = [*range(count, count + dims[0]), *range(count), *range(count + dims[0], total)]
    return b.transpose(picked, *back)


def _stacked(b: Builder, indices: list[ir.Value]) -> ir.Value:
    """Index tensors, broadcast, as one [..., n]."""
    whole = [b.to(i, INT) for i in indices]
    zero = whole[0]
    for other in whole[1:]:
        zero = b.op("Add", zero, other)
    sizes = b.op("Shape", zero, dtype=INT)
    return b.op("Concat", *(b.unsqueeze(b.op("Expand", i, sizes), -1) for i in whole), axis=-1)


@lowers("aten.index_put", "aten._unsafe_index_put")
def index_put(b: Builder, x: ir.Value, indices: list[Any], values: Any, accumulate=False) -> Any:
    if any(i is None for i in indices):
        raise NotImplementedError("index_put that leaves out dimensions")
    reduction = "add" if accumulate else "none"
    if indices[0].dtype == ir.DataType.BOOL:
        if len(indices) > 1:
            raise NotImplementedError("index_put of several masks")
        where = b.transpose(b.op("NonZero", indices[0], dtype=INT), 1, 0)
    else:
        where = _stacked(b, indices)
    rest = b.op("Shape", x, dtype=INT)
    rest = b.slice(rest, len(indices) if indices[0].dtype != ir.DataType.BOOL
                   else rank(indices[0]), 2**31, 0)  # fmt: skip
    sizes = b.op("Concat", b.op("Shape", where, dtype=INT, end=-1), rest, axis=0)
    return b.op("ScatterND", x, where, b.op("Expand", b.to(values), sizes), reduction=reduction)


@lowers("aten.scatter")
def scatter(b: Builder, x: ir.Value, dim: int, index: ir.Value, source: Any, **_: Any) -> Any:
    if not isinstance(source, ir.Value) or rank(source) == 0:
        source = b.op("Expand", b.to(source), b.op("Shape", index, dtype=INT))
    return b.op("ScatterElements", x, index, b.to(source), axis=dim)


@lowers("aten.scatter_add")
def scatter_add(b: Builder, x: ir.Value, dim: int, index: ir.Value, source: ir.Value) -> Any:
    return b.op("ScatterElements", x, index, source, axis=dim, reduction="add")


@lowers("aten.scatter_reduce")
def scatter_reduce(
    b: Builder, x: ir.Value, dim: int, index: ir.Value, source: ir.Value, how: str, **kw: Any
) -> Any:
    names = {"sum": "add", "amax": "max", "amin": "min", "prod": "mul"}
    if how not in names or not kw.get("include_self", True):
        raise NotImplementedError(f"scatter_reduce by {how}")
    return b.op("ScatterElements", x, index, source, axis=dim, reduction=names[how])


@lowers("aten.index_add")
def index_add(b: Builder, x: ir.Value, dim: int, index: ir.Value, source: ir.Value, *, alpha=1):
    if dim % rank(x):
        raise NotImplementedError("index_add behind the first dimension")
    if alpha != 1:
        source = b.op("Mul", source, b.to(alpha))
    return b.op("ScatterND", x, b.unsqueeze(index, -1), b.to(source), reduction="add")


@lowers("aten.nonzero")
def nonzero(b: Builder, x: ir.Value) -> Any:
    return b.transpose(b.op("NonZero", x, dtype=INT), 1, 0)


@lowers("aten.masked_scatter")
def masked_scatter(b: Builder, x: ir.Value, mask: ir.Value, source: ir.Value) -> Any:
    whole = b.op("Expand", mask, b.op("Shape", x, dtype=INT))
    where = b.transpose(b.op("NonZero", whole, dtype=INT), 1, 0)
    flat = b.slice(b.reshape(source, [-1]), 0, Size(b.size(where, 0)), 0)
    return b.op("ScatterND", x, where, flat)


@lowers("aten.take_along_dim")
def take_along_dim(b: Builder, x: ir.Value, index: ir.Value, dim: int) -> Any:
    return b.op("GatherElements", x, index, axis=dim)


@lowers("aten.bucketize")
def bucketize(b: Builder, x: ir.Value, bounds: ir.Value, *, right: bool = False, **_: Any) -> Any:
    below = b.op(
        "GreaterOrEqual" if right else "Greater",
        b.unsqueeze(x, -1),
        b.to(bounds, torch.float32) if x.dtype == ir.DataType.FLOAT else bounds,
        dtype=torch.bool,
    )
    return b.op("ReduceSum", b.cast(below, INT), b.constant([-1]), keepdims=0)
