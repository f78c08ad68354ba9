"""Arithmetic on dynamic sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import onnx_ir as ir

from regraft.frontends.export.builder import INT, Builder, Size, handlers, lowers

ARITHMETIC = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "floordiv": "Div", "mod": "Mod", "sym_max": "Max",
    "sym_min": "Min",
}  # fmt: skip


def _arithmetic(onnx: str, b: Builder, x: Any, y: Any) -> Any:
    return Size(b.op(onnx, b.vector(x), b.vector(y), dtype=INT))


for name, onnx in ARITHMETIC.items():
    handlers[name] = partial(_arithmetic, onnx)


@lowers("neg")
def neg(b: Builder, x: Size) -> Size:
    return Size(b.op("Neg", x.value))


@lowers("aten.sym_size")
def sym_size(b: Builder, x: ir.Value, dim: int) -> Any:
    known = x.shape[dim] if x.shape is not None else None
    return known if isinstance(known, int) else Size(b.size(x, dim))


@lowers("aten.sym_numel")
def sym_numel(b: Builder, x: ir.Value) -> Size:
    return Size(b.op("Reshape", b.op("Size", x, dtype=INT), b.constant([1])))


@lowers("aten.item")
def item(b: Builder, x: ir.Value) -> Any:
    """An integer as a size, another number as the tensor that it is."""
    return Size(b.vector(x)) if x.dtype in (ir.DataType.INT64, ir.DataType.INT32) else x


@lowers("getitem")
def getitem(b: Builder, x: Any, index: int) -> Any:
    return x[index]
