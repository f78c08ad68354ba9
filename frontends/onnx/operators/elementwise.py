"""Arithmetic, comparison, logic, activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.frontends.onnx.registry import operator
from regraft.frontends.onnx.values import is_strings, strings

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Det": torch.linalg.det,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}
_VARIADIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Sum": torch.add,
}


def _unary(function: Callable[[Tensor], Tensor]) -> Callable:
    return lambda x: function(x)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    return lambda a, b: function(a, b)


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    return lambda *inputs: reduce(function, inputs)


for _name, _function in _UNARY.items():
    operator(_name, widen=True)(_unary(_function))
for _name, _pair in _BINARY.items():
    operator(_name, widen=True)(_binary(_pair))
for _name, _pair in _VARIADIC.items():
    operator(_name, widen=True)(_variadic(_pair))


@operator("Abs", widen=True)
def absolute(x):
    return x if x.dtype == torch.uint8 else x.abs()


@operator("Equal", widen=True)
def equal(a, b):
    return torch.eq(a, b)


@operator("Mean")
def mean(*inputs):
    return reduce(torch.add, inputs) / len(inputs)


@operator("Div", widen=True)
def div(a, b):
    if a.is_floating_point() or a.is_complex():
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


@operator("Mod", widen=True)
def mod(a, b, *, fmod=0):
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@operator("Pow", widen=True)
def power(base, exponent):
    if base.dtype == exponent.dtype:
        return torch.pow(base, exponent)
    if not exponent.is_floating_point():
        return torch.pow(base, exponent.to(torch.int64)).to(base.dtype)
    wide = base if base.is_floating_point() else base.double()
    return torch.pow(wide, exponent.to(wide.dtype)).to(base.dtype)


@operator("BitShift", widen=True)
def bit_shift(x, by, *, direction):
    return x << by if direction == "LEFT" else x >> by


@operator("IsInf")
def is_infinite(x, *, detect_negative=1, detect_positive=1):
    found = torch.isinf(x)
    if not detect_negative:
        found = found & (x > 0)
    return found if detect_positive else found & (x < 0)


@operator("Where", widen=True)
def where(condition, a, b):
    if is_strings(a):
        return strings(np.where(condition.numpy(), a.values, b.values))
    return torch.where(condition, a, b)


@operator("Clip", widen=True)
def clip(x, min=None, max=None):
    low, high = (None if v is None else _scalar(v, x) for v in (min, max))
    if low is None and high is None:
        return x
    # the upper limit wins where the limits cross
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _scalar(value: Any, like: Tensor) -> Tensor:
    if torch.is_tensor(value):
        return value.to(like.dtype)
    return torch.tensor(value, dtype=like.dtype, device=like.device)


@operator("Celu")
def celu(x, *, alpha=1.0):
    return F.celu(x, alpha)


@operator("Elu")
def elu(x, *, alpha=1.0):
    return F.elu(x, alpha)


@operator("Gelu")
def gelu(x, *, approximate="none"):
    return F.gelu(x, approximate=approximate)


@operator("HardSigmoid")
def hard_sigmoid(x, *, alpha=0.2, beta=0.5):
    return (x * alpha + beta).clamp(0, 1)


@operator("LeakyRelu")
def leaky_relu(x, *, alpha=0.01):
    return F.leaky_relu(x, alpha)


@operator("Selu")
def selu(x, *, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875):
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


@operator("Shrink", widen=True)
def shrink(x, *, bias=0.0, lambd=0.5):
    shrunk = torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0))
    return shrunk.to(x.dtype)


@operator("Swish")
def swish(x, *, alpha=1.0):
    return x * torch.sigmoid(alpha * x)


@operator("SwiGLU")
def swiglu(a, b, *, alpha=1.0):
    return swish(a, alpha=alpha) * b


@operator("ThresholdedRelu")
def thresholded_relu(x, *, alpha=1.0):
    return torch.where(x > alpha, x, 0)


def _flattened(function: Callable[..., Tensor]) -> Callable:
    """Before opset 13 the dimensions from the axis on are one."""

    def call(x, *, axis=1):
        start = axis % x.dim() if x.dim() else 0
        if start == x.dim() - 1:
            return function(x, -1)
        return function(x.flatten(start), -1).reshape(x.shape)

    return call


def _along(function: Callable[..., Tensor]) -> Callable:
    def call(x, *, axis=-1):
        return function(x, axis)

    return call


def _hardmax(x: Tensor, axis: int) -> Tensor:
    found = x.argmax(axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, found, 1)


_SOFTMAX: dict[str, Any] = {
    "Softmax": torch.softmax,
    "LogSoftmax": torch.log_softmax,
    "Hardmax": _hardmax,
}
for _name, _softmax in _SOFTMAX.items():
    operator(_name, since=1)(_flattened(_softmax))
    operator(_name, since=13)(_along(_softmax))
