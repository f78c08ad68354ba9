"""Operators that make tensors of sizes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from regraft.frontends.export.builder import INT, Builder, Size, lowers, rank


def filled(b: Builder, sizes: list[Any], value: Any) -> Any:
    return b.op("Expand", b.to(value), b.numbers(sizes)) if sizes else b.to(value)


@lowers("aten.full", "aten.new_full")
def full(b: Builder, *args: Any, **_: Any) -> Any:
    sizes, value = args[-2:]
    return filled(b, sizes, value)


@lowers("aten.zeros", "aten.empty")
def zeros(b: Builder, sizes: list[Any], **_: Any) -> Any:
    return filled(b, sizes, 0)


@lowers("aten.ones")
def ones(b: Builder, sizes: list[Any], **_: Any) -> Any:
    return filled(b, sizes, 1)


@lowers("aten.new_zeros", "aten.new_empty")
def new_zeros(b: Builder, x: Any, sizes: list[Any], **_: Any) -> Any:
    return filled(b, sizes, 0)


@lowers("aten.new_ones")
def new_ones(b: Builder, x: Any, sizes: list[Any], **_: Any) -> Any:
    return filled(b, sizes, 1)


@lowers("aten.zeros_like", "aten.empty_like")
def zeros_like(b: Builder, x: Any, **_: Any) -> Any:
    return b.op("Expand", b.to(0), b.op("Shape", x, dtype=INT))


@lowers("aten.ones_like")
def ones_like(b: Builder, x: Any, **_: Any) -> Any:
    return b.op("Expand", b.to(1), b.op("Shape", x, dtype=INT))


@lowers("aten.full_like")
def full_like(b: Builder, x: Any, value: Any, **_: Any) -> Any:
    return b.op("Expand", b.to(value), b.op("Shape", x, dtype=INT))


@lowers("aten.fill")
def fill(b: Builder, x: Any, value: Any) -> Any:
    return b.op("Expand", b.to(value), b.op("Shape", x, dtype=INT))


@lowers("aten.scalar_tensor")
def scalar_tensor(b: Builder, value: Any, **_: Any) -> Any:
    return b.to(value)


@lowers("aten.arange")
def arange(b: Builder, *args: Any, **_: Any) -> Any:
    start, stop, step = (0, *args, 1) if len(args) == 1 else (*args, 1)[:3]
    return b.op("Range", b.to(start), b.to(stop), b.to(step))


@lowers("aten.tril")
def tril(b: Builder, x: Any, diagonal: int = 0) -> Any:
    return _triangle(b, x, diagonal, upper=0)


@lowers("aten.triu")
def triu(b: Builder, x: Any, diagonal: int = 0) -> Any:
    return _triangle(b, x, diagonal, upper=1)


def _triangle(b: Builder, x: ir.Value, diagonal: Any, upper: int) -> Any:
    k = b.to(diagonal, INT) if not isinstance(diagonal, Size) else b.squeeze(diagonal.value, 0)
    if b.dtype != torch.bool:
        return b.op("Trilu", x, k, upper=upper)
    return b.cast(b.op("Trilu", b.cast(x, INT), k, upper=upper), torch.bool)


@lowers("aten.one_hot")
def one_hot(b: Builder, x: ir.Value, classes: int) -> Any:
    values = b.constant([0, 1], INT)
    return b.op("OneHot", x, b.constant(classes, INT), values, dtype=INT, axis=-1)


@lowers("aten.eye")
def eye(b: Builder, n: Any, m: Any = None, **_: Any) -> Any:
    sizes = [n, n if m is None else m]
    return b.op("EyeLike", filled(b, sizes, 0))


@lowers("aten.tensor", "aten.lift_fresh")
def tensor(b: Builder, x: Any, **_: Any) -> Any:
    return b.to(x)


@lowers("aten.meshgrid")
def meshgrid(b: Builder, tensors: list[ir.Value], *, indexing: str = "ij") -> Any:
    if indexing != "ij" or any(rank(x) != 1 for x in tensors):
        raise NotImplementedError("meshgrid of xy")
    sizes = b.op("Concat", *(b.size(x, 0) for x in tensors), axis=0)
    count = len(tensors)
    return [
        b.op("Expand", b.unsqueeze(x, *(d for d in range(count) if d != i)), sizes)
        for i, x in enumerate(tensors)
    ]


@lowers("aten.copy")
def copy(b: Builder, x: Any, source: Any, *_: Any) -> Any:
    return b.op("Expand", b.to(source), b.op("Shape", x, dtype=INT))
