"""Operators that work element by element."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from regraft.frontends.export.builder import INT, TORCH, Builder, handlers, lowers

UNARY = {
    "abs": "Abs", "acos": "Acos", "acosh": "Acosh", "asin": "Asin", "asinh": "Asinh",
    "atan": "Atan", "atanh": "Atanh", "ceil": "Ceil", "cos": "Cos", "cosh": "Cosh", "erf": "Erf",
    "exp": "Exp", "floor": "Floor", "isnan": "IsNaN", "isinf": "IsInf", "log": "Log",
    "logical_not": "Not", "neg": "Neg", "reciprocal": "Reciprocal", "relu": "Relu",
    "round": "Round", "sigmoid": "Sigmoid", "sign": "Sign", "sin": "Sin", "sinh": "Sinh",
    "sqrt": "Sqrt", "tan": "Tan", "tanh": "Tanh",
}  # fmt: skip
TESTS = {"IsNaN", "IsInf"}
BINARY = {"mul": "Mul", "maximum": "Max", "minimum": "Min"}
COMPARE = {
    "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual",
}  # fmt: skip
LOGICAL = {"logical_and": "And", "logical_or": "Or", "logical_xor": "Xor"}
BITWISE = {"and": "And", "or": "Or", "xor": "Xor"}


def _unary(onnx: str, b: Builder, x: Any, *, decimals: int = 0) -> Any:
    if onnx in TESTS:
        return b.op(onnx, x, dtype=torch.bool)
    return b.op(onnx, b.to(x))


def _binary(onnx: str, b: Builder, x: Any, y: Any) -> Any:
    if b.dtype == torch.bool:
        return b.op({"Mul": "And", "Max": "Or", "Min": "And"}[onnx], b.to(x), b.to(y))
    return b.op(onnx, b.to(x), b.to(y))


def common(b: Builder, x: Any, y: Any) -> tuple[Any, Any]:
    """Both in the type that they are compared in."""
    known = [TORCH[v.dtype] for v in (x, y) if getattr(v, "dtype", None) is not None]
    dtype = known[0] if known else INT
    for other in known[1:]:
        dtype = torch.promote_types(dtype, other)
    for number in (x, y):
        if isinstance(number, float) and not dtype.is_floating_point:
            dtype = torch.float32
    return b.to(x, dtype), b.to(y, dtype)


def _compare(onnx: str, b: Builder, x: Any, y: Any) -> Any:
    return b.op(onnx, *common(b, x, y), dtype=torch.bool)


def _logical(onnx: str, b: Builder, x: Any, y: Any) -> Any:
    return b.op(onnx, b.to(x, torch.bool), b.to(y, torch.bool))


def _bitwise(onnx: str, b: Builder, x: Any, y: Any) -> Any:
    name = onnx if b.dtype == torch.bool else f"Bitwise{onnx}"
    return b.op(name, b.to(x), b.to(y))


for aten, onnx in UNARY.items():
    handlers[f"aten.{aten}"] = partial(_unary, onnx)
for aten, onnx in BINARY.items():
    handlers[f"aten.{aten}"] = partial(_binary, onnx)
for aten, onnx in COMPARE.items():
    handlers[f"aten.{aten}"] = partial(_compare, onnx)
for aten, onnx in LOGICAL.items():
    handlers[f"aten.{aten}"] = partial(_logical, onnx)
for aten, onnx in BITWISE.items():
    handlers[f"aten.bitwise_{aten}"] = handlers[f"aten.__{aten}__"] = partial(_bitwise, onnx)


@lowers("aten.add")
def add(b: Builder, x: Any, y: Any, *, alpha: Any = 1) -> Any:
    if b.dtype == torch.bool:
        return b.op("Or", b.to(x), b.to(y))
    y = b.to(y)
    return b.op("Add", b.to(x), y if alpha == 1 else b.op("Mul", y, b.to(alpha)))


@lowers("aten.sub")
def sub(b: Builder, x: Any, y: Any, *, alpha: Any = 1) -> Any:
    y = b.to(y)
    return b.op("Sub", b.to(x), y if alpha == 1 else b.op("Mul", y, b.to(alpha)))


@lowers("aten.rsub")
def rsub(b: Builder, x: Any, y: Any, alpha: Any = 1) -> Any:
    return sub(b, y, x, alpha=alpha)


@lowers("aten.div", "aten.true_divide")
def div(b: Builder, x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is None:
        return b.op("Div", b.to(x), b.to(y))
    if b.dtype.is_floating_point:
        quotient = b.op("Div", b.to(x), b.to(y))
        if rounding_mode == "floor":
            return b.op("Floor", quotient)
        return b.op("Mul", b.op("Sign", quotient), b.op("Floor", b.op("Abs", quotient)))
    return floor_divide(b, x, y) if rounding_mode == "floor" else b.op("Div", b.to(x), b.to(y))


@lowers("aten.floor_divide")
def floor_divide(b: Builder, x: Any, y: Any) -> Any:
    x, y = b.to(x), b.to(y)
    if b.dtype.is_floating_point:
        return b.op("Floor", b.op("Div", x, y))
    return b.op("Div", b.op("Sub", x, b.op("Mod", x, y)), y)


@lowers("aten.remainder", "aten.fmod")
def remainder(b: Builder, x: Any, y: Any) -> Any:
    x, y = b.to(x), b.to(y)
    if b.dtype.is_floating_point:
        return b.op("Sub", x, b.op("Mul", b.op("Floor", b.op("Div", x, y)), y))
    return b.op("Mod", x, y)


@lowers("aten.pow")
def pow(b: Builder, x: Any, y: Any) -> Any:
    if y == 2:
        x = b.to(x)
        return b.op("Mul", x, x)
    return b.op("Pow", b.to(x), b.to(y))


@lowers("aten.square")
def square(b: Builder, x: Any) -> Any:
    return b.op("Mul", x, x)


@lowers("aten.rsqrt")
def rsqrt(b: Builder, x: Any) -> Any:
    return b.op("Reciprocal", b.op("Sqrt", b.to(x)))


def _scaled_log(base: float, b: Builder, x: Any) -> Any:
    return b.op("Div", b.op("Log", b.to(x)), b.to(math.log(base)))


handlers["aten.log2"], handlers["aten.log10"] = partial(_scaled_log, 2), partial(_scaled_log, 10)


@lowers("aten.log1p")
def log1p(b: Builder, x: Any) -> Any:
    return b.op("Log", b.op("Add", b.to(x), b.to(1)))


@lowers("aten.expm1")
def expm1(b: Builder, x: Any) -> Any:
    return b.op("Sub", b.op("Exp", b.to(x)), b.to(1))


@lowers("aten.exp2")
def exp2(b: Builder, x: Any) -> Any:
    return b.op("Pow", b.to(2), b.to(x))


# of log((1 - x)(1 + x)): up to -5, and of its square root beyond
_CENTRE = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
           -0.00125372503, -0.00417768164, 0.246640727, 1.50140941)  # fmt: skip
_TAIL = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
         -0.0076224613, 0.00943887047, 1.00167406, 2.83297682)  # fmt: skip


@lowers("aten.erfinv", "aten.special_erfinv")
def erfinv(b: Builder, x: Any) -> Any:
    """M. Giles, "Approximating the erfinv function", 2011: single precision; a step of Newton's
    method makes up for its rounding."""
    dtype, x = b.dtype, b.to(x, torch.float32)

    def number(value: float) -> Any:
        return b.constant(value, torch.float32)

    one = number(1.0)
    product = b.op("Mul", b.op("Sub", one, x), b.op("Add", one, x))
    w = b.op("Neg", b.op("Log", product))
    central = b.op("Less", w, number(5.0), dtype=torch.bool)
    small, large = b.op("Sub", w, number(2.5)), b.op("Sub", b.op("Sqrt", w), number(3.0))
    parts = []
    for variable, (first, *rest) in ((small, _CENTRE), (large, _TAIL)):
        total = number(first)
        for coefficient in rest:
            total = b.op("Add", b.op("Mul", total, variable), number(coefficient))
        parts.append(b.op("Mul", total, x))
    y = b.op("Where", central, *parts)
    slope = b.op("Mul", b.op("Exp", b.op("Mul", y, y)), number(math.sqrt(math.pi) / 2))
    missing = b.op("Sub", b.op("Erf", y), x)
    refined = b.op("Sub", y, b.op("Mul", missing, slope))
    y = b.op("Where", central, refined, y)
    end = b.op("Equal", b.op("Abs", x), one, dtype=torch.bool)
    limit = b.op("Mul", b.op("Sign", x), number(math.inf))
    return b.to(b.op("Where", end, limit, y), dtype)


@lowers("aten.ne")
def ne(b: Builder, x: Any, y: Any) -> Any:
    return b.op("Not", _compare("Equal", b, x, y))


@lowers("aten.bitwise_not")
def bitwise_not(b: Builder, x: Any) -> Any:
    return b.op("Not" if b.dtype == torch.bool else "BitwiseNot", x)


@lowers("aten.where")
def where(b: Builder, condition: Any, x: Any, y: Any) -> Any:
    return b.op("Where", condition, b.to(x), b.to(y), dtype=b.dtype)


@lowers("aten.masked_fill")
def masked_fill(b: Builder, x: Any, mask: Any, value: Any) -> Any:
    return b.op("Where", mask, b.to(value), b.to(x), dtype=b.dtype)


@lowers("aten.clamp", "aten.clip")
def clamp(b: Builder, x: Any, low: Any = None, high: Any = None, *, min=None, max=None) -> Any:
    low, high, x = low if min is None else min, high if max is None else max, b.to(x)
    if low is not None:
        x = b.op("Max", x, b.to(low))
    return x if high is None else b.op("Min", x, b.to(high))


@lowers("aten.clamp_min")
def clamp_min(b: Builder, x: Any, low: Any) -> Any:
    return b.op("Max", b.to(x), b.to(low))


@lowers("aten.clamp_max")
def clamp_max(b: Builder, x: Any, high: Any) -> Any:
    return b.op("Min", b.to(x), b.to(high))


@lowers("aten.to", "aten._to_copy", "aten.type_as", "aten.float", "aten.bool", "aten.half",
        "aten.clone", "aten.contiguous", "aten.detach", "aten.alias", "aten.lift_fresh_copy",
        "aten.dropout", "aten.feature_dropout")  # fmt: skip
def identity(b: Builder, x: Any, *_: Any, **__: Any) -> Any:
    """x in the type of the result."""
    return b.to(x)


for name, same in {"multiply": "mul", "subtract": "sub", "divide": "div", "negative": "neg",
                   "absolute": "abs", "greater": "gt", "greater_equal": "ge", "less": "lt",
                   "less_equal": "le", "not_equal": "ne"}.items():  # fmt: skip
    handlers[f"aten.{name}"] = handlers[f"aten.{same}"]
