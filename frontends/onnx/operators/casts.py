"""Changes of type."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from regraft.frontends.onnx.registry import operator
from regraft.frontends.onnx.values import DTYPES, Host, is_strings, strings

_INTEGERS: dict[int, tuple[int, bool]] = {
    ir.DataType.INT4: (4, True),
    ir.DataType.UINT4: (4, False),
    ir.DataType.INT2: (2, True),
    ir.DataType.UINT2: (2, False),
}
_FLOATS: dict[int, tuple[int, int, float]] = {  # mantissa bits, least exponent, largest value
    ir.DataType.FLOAT4E2M1: (1, 0, 6.0),
    ir.DataType.FLOAT6E2M3: (3, 0, 7.5),
    ir.DataType.FLOAT6E3M2: (2, -2, 28.0),
}


@operator("Cast")
def cast(x, *, to, saturate=1, round_mode="up", types=()):
    if to == ir.DataType.STRING:
        return x if is_strings(x) else _to_strings(x)
    if is_strings(x):
        x = _from_strings(x)
    return convert(x, to, bool(saturate), round_mode)


@operator("CastLike")
def cast_like(x, like, *, saturate=1, round_mode="up", types):
    if is_strings(like):
        return cast(x, to=ir.DataType.STRING)
    to = types[1] or ir.DataType.UNDEFINED
    if to == ir.DataType.UNDEFINED:
        to = next(key for key, dtype in DTYPES.items() if dtype == like.dtype)
    return cast(x, to=to, saturate=saturate, round_mode=round_mode)


@operator("BitCast")
def bit_cast(x, *, to):
    return x.view(DTYPES[to])


def convert(x: Tensor, to: int, saturate: bool = True, round_mode: str = "up") -> Tensor:
    """x as the ONNX type, by the rules of Cast."""
    dtype = DTYPES[to]
    if "float8" in str(x.dtype):
        x = x.float()
    if to in _INTEGERS:
        return _wrap(x, *_INTEGERS[to]).to(dtype)
    if to in _FLOATS:
        return round_float(x.float(), *_FLOATS[to])
    if dtype == torch.float8_e8m0fnu:
        return _exponent(x.float(), saturate, round_mode)
    if "float8" in str(dtype):
        x = x.float()
        if saturate:
            limit = torch.finfo(dtype).max
            x = x.clamp(-limit, limit)
        elif dtype != torch.float8_e5m2:
            few = round_float(x, 3 if "e4m3" in str(dtype) else 2, -15, math.inf)
            x = torch.where(few.abs() > torch.finfo(dtype).max, math.nan, x)
        return x.to(dtype)
    if dtype == torch.bool or dtype.is_floating_point or dtype.is_complex:
        return x.to(dtype)
    if x.is_floating_point() and dtype not in (torch.int32, torch.int64, torch.uint64):
        x = x.to(torch.int64)
    return x.to(dtype)


def _wrap(x: Tensor, bits: int, signed: bool) -> Tensor:
    count = 1 << bits
    x = x.to(torch.int64)
    return (x + count // 2) % count - count // 2 if signed else x % count


def round_float(x: Tensor, mantissa: int, least: int, largest: float) -> Tensor:
    """x rounded half to even to a float of few bits, saturating."""
    _, exponent = torch.frexp(x)
    step = torch.ldexp(torch.ones_like(x), (exponent - 1).clamp(min=least) - mantissa)
    return (torch.round(x / step) * step).clamp(-largest, largest)


def _exponent(x: Tensor, saturate: bool, round_mode: str) -> Tensor:
    fraction, exponent = torch.frexp(x.abs())
    exponent = exponent - 1  # x = (2 * fraction) * 2**exponent, 1 <= 2 * fraction < 2
    over = {"up": fraction > 0.5, "down": fraction < 0, "nearest": fraction >= 0.75}[round_mode]
    code = exponent + 127 + over.to(exponent.dtype)
    bad = x.isnan()
    if saturate:
        code = torch.where(x.isinf(), 254, torch.where(x == 0, 0, code)).clamp(0, 254)
    else:
        bad = bad | x.isinf() | (x == 0) | (code > 254) | (code < 0)
    return torch.where(bad, 255, code).to(torch.uint8).view(torch.float8_e8m0fnu)


def _to_strings(x: Tensor) -> Host:
    values = x.float() if x.dtype == torch.bfloat16 or "float8" in str(x.dtype) else x
    if values.is_floating_point():
        text = [_decimal(v) for v in values.numpy().ravel()]
    else:
        text = [str(v) for v in values.numpy().ravel()]
    return strings(np.array(text, dtype=object).reshape(tuple(x.shape)))


def _decimal(value: np.floating) -> str:
    if not np.isfinite(value):
        return {"nan": "NaN", "inf": "INF", "-inf": "-INF"}[str(value)]
    return np.format_float_positional(value, trim="-").rstrip(".")


def _from_strings(x: Host) -> Tensor:
    numbers = [_number(text) for text in x.numbers()]
    whole = all(isinstance(n, int) for n in numbers)
    made = torch.tensor(numbers, dtype=torch.int64 if whole else torch.float64)
    return made.reshape(x.shape)


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)
