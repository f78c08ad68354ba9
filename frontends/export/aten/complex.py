"""Complex tensors as pairs of real ones; ONNX has hardly any operators for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from regraft.frontends.export.builder import Builder, handlers, lowers, rank

STRUCTURAL = {
    f"aten.{name}"
    for name in (
        *("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "transpose", "permute"),
        *("expand", "slice", "select", "index", "contiguous", "clone", "to", "flatten", "cat"),
        *("index_select", "repeat", "detach", "alias"),
    )
}
"""What works on both parts alike."""


@dataclass(frozen=True)
class Complex:
    """A complex tensor."""

    real: ir.Value
    imag: ir.Value


def of_parts(b: Builder, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """An operator of which an argument is complex."""
    if name in ("aten.view_as_real", "aten.mul", "aten.abs", "aten.real", "aten.imag"):
        return handlers[f"complex.{name.removeprefix('aten.')}"](b, *args, **kwargs)
    if name not in STRUCTURAL:
        raise NotImplementedError("it is complex")
    handler = handlers[name]
    return Complex(*(handler(b, *_part(args, part), **kwargs) for part in ("real", "imag")))


def _part(args: list[Any], part: str) -> list[Any]:
    return [
        _part(a, part) if isinstance(a, list) else getattr(a, part) if isinstance(a, Complex) else a
        for a in args
    ]


@lowers("aten.polar")
def polar(b: Builder, size: ir.Value, angle: ir.Value) -> Complex:
    return Complex(*(b.op("Mul", size, b.op(name, angle)) for name in ("Cos", "Sin")))


@lowers("aten.view_as_complex")
def view_as_complex(b: Builder, x: ir.Value) -> Complex:
    return Complex(*(b.op("Gather", x, b.constant(i), axis=rank(x) - 1) for i in (0, 1)))


@lowers("complex.view_as_real")
def view_as_real(b: Builder, x: Complex) -> Any:
    return b.op("Concat", b.unsqueeze(x.real, -1), b.unsqueeze(x.imag, -1), axis=-1)


@lowers("complex.real")
def real(b: Builder, x: Complex) -> Any:
    return x.real


@lowers("complex.imag")
def imag(b: Builder, x: Complex) -> Any:
    return x.imag


@lowers("complex.abs")
def absolute(b: Builder, x: Complex) -> Any:
    squares = (b.op("Mul", part, part) for part in (x.real, x.imag))
    return b.op("Sqrt", b.op("Add", *squares))


@lowers("complex.mul")
def mul(b: Builder, x: Any, y: Any) -> Complex:
    if not isinstance(x, Complex):
        x, y = y, x
    if not isinstance(y, Complex):
        return Complex(*(b.op("Mul", part, b.to(y)) for part in (x.real, x.imag)))
    products = [b.op("Mul", p, q) for p in (x.real, x.imag) for q in (y.real, y.imag)]
    return Complex(b.op("Sub", products[0], products[3]), b.op("Add", products[1], products[2]))
