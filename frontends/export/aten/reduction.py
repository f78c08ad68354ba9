"""Operators that reduce, sort and scan along dimensions."""

from __future__ import annotations

from functools import partial
from typing import Any

import onnx_ir as ir
import torch

from regraft.frontends.export.builder import INT, Builder, Size, handlers, lowers, rank


def reduced(b: Builder, onnx: str, x: ir.Value, dims: Any, keep: bool) -> Any:
    """x reduced over dims, None or [] for all."""
    if dims is None or dims == []:
        return b.op(onnx, x, keepdims=int(keep))
    axes = [dims] if isinstance(dims, int) else list(dims)
    if onnx != "ReduceSum" and b.opset < 18:
        return b.op(onnx, x, axes=axes, keepdims=int(keep))
    return b.op(onnx, x, b.constant(axes, INT), keepdims=int(keep))


def _reduce(onnx: str, b: Builder, x: Any, dims: Any = None, keep: bool = False, **_: Any) -> Any:
    return reduced(b, onnx, b.to(x), dims, keep)


for aten, onnx in {"sum": "ReduceSum", "mean": "ReduceMean", "amax": "ReduceMax",
                   "amin": "ReduceMin", "prod": "ReduceProd"}.items():  # fmt: skip
    handlers[f"aten.{aten}"] = partial(_reduce, onnx)


def _extreme(onnx: str, b: Builder, x: ir.Value, *args: Any) -> Any:
    """max and min: over everything, of two tensors, or values and indices along a dimension."""
    if not args:
        return reduced(b, f"Reduce{onnx}", x, None, False)
    if isinstance(args[0], ir.Value):
        return b.op(onnx, b.to(x), b.to(args[0]))
    dim, keep = args[0], bool(args[1:] and args[1])
    index = b.op(f"Arg{onnx}", x, dtype=INT, axis=dim, keepdims=int(keep))
    return [reduced(b, f"Reduce{onnx}", x, dim, keep), index]


handlers["aten.max"], handlers["aten.min"] = partial(_extreme, "Max"), partial(_extreme, "Min")


def _arg(onnx: str, b: Builder, x: ir.Value, dim: int | None = None, keep: bool = False) -> Any:
    if dim is None:
        x, dim = b.reshape(x, [-1]), 0
    return b.op(onnx, x, dtype=INT, axis=dim, keepdims=int(keep))


handlers["aten.argmax"], handlers["aten.argmin"] = partial(_arg, "ArgMax"), partial(_arg, "ArgMin")


@lowers("aten.any")
def any_(b: Builder, x: ir.Value, dims: Any = None, keep: bool = False) -> Any:
    whole = b.cast(b.to(x, torch.bool), torch.int32)
    return b.cast(reduced(b, "ReduceMax", whole, dims, keep), torch.bool)


@lowers("aten.all")
def all_(b: Builder, x: ir.Value, dims: Any = None, keep: bool = False) -> Any:
    whole = b.cast(b.to(x, torch.bool), torch.int32)
    return b.cast(reduced(b, "ReduceMin", whole, dims, keep), torch.bool)


@lowers("aten.var")
def var(b: Builder, x: ir.Value, dims: Any = None, *args: Any, correction: Any = 1, **kw: Any):
    """Arguments are (unbiased), (dims, unbiased, keepdim) or (dims, correction=, keepdim=)."""
    if isinstance(dims, bool):
        dims, args = None, (dims, *args)
    correction = int(args[0]) if args else 1 if correction is None else correction
    keep = bool(args[1]) if len(args) > 1 else bool(kw.get("keepdim", False))
    mean = reduced(b, "ReduceMean", x, dims, True)
    centred = b.op("Sub", x, mean)
    square = b.op("Mul", centred, centred)
    if not correction:
        return reduced(b, "ReduceMean", square, dims, keep)
    count = b.op("Div", b.op("Size", x, dtype=INT), b.op("Size", mean, dtype=INT))
    fewer = b.op("Sub", b.cast(count, b.dtype), b.to(correction))
    return b.op("Div", reduced(b, "ReduceSum", square, dims, keep), fewer)


@lowers("aten.std")
def std(b: Builder, *args: Any, **kwargs: Any):
    return b.op("Sqrt", var(b, *args, **kwargs))


@lowers("aten.linalg_vector_norm", "aten.norm")
def vector_norm(b: Builder, x: ir.Value, order: Any = 2, dims: Any = None, keep=False, **_: Any):
    if order not in (1, 2):
        raise NotImplementedError(f"a norm of order {order}")
    return reduced(b, f"ReduceL{order}", b.to(x), dims, keep)


@lowers("aten.logsumexp")
def logsumexp(b: Builder, x: ir.Value, dims: Any, keep: bool = False) -> Any:
    return reduced(b, "ReduceLogSumExp", x, dims, keep)


@lowers("aten.cumsum")
def cumsum(b: Builder, x: Any, dim: int, **_: Any) -> Any:
    return b.op("CumSum", b.to(x), b.constant(dim, INT))


@lowers("aten.softmax", "aten._softmax", "aten._safe_softmax")
def softmax(b: Builder, x: Any, dim: int, *_: Any, **__: Any) -> Any:
    return b.op("Softmax", b.to(x), axis=dim)


@lowers("aten.log_softmax", "aten._log_softmax")
def log_softmax(b: Builder, x: Any, dim: int, *_: Any, **__: Any) -> Any:
    return b.op("LogSoftmax", b.to(x), axis=dim)


@lowers("aten.topk")
def topk(b: Builder, x: ir.Value, k: Any, dim: int = -1, largest=True, ordered=True) -> Any:
    values, index = b.op(
        *("TopK", x, b.vector(k)),
        outputs=2, axis=dim, largest=int(largest), sorted=int(ordered),
    )  # fmt: skip
    index.type = ir.TensorType(ir.DataType.INT64)
    return [values, index]


@lowers("aten.sort")
def sort(b: Builder, x: ir.Value, *args: Any, dim: int = -1, descending: bool = False, stable=None):
    if args and isinstance(args[0], bool) and len(args) > 1 and not isinstance(args[1], bool):
        _, dim, *rest = args
    else:
        dim, *rest = (*args, dim)[:2] if args else (dim,)
    descending = bool(rest[0]) if rest and isinstance(rest[0], bool) else descending
    return topk(b, x, Size(b.size(x, dim % rank(x))), dim, descending)


@lowers("aten.argsort")
def argsort(b: Builder, x: ir.Value, dim: int = -1, descending: bool = False, **kw: Any) -> Any:
    return sort(b, x, dim, descending, **kw)[1]
