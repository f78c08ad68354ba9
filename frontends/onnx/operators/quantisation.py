"""Linear quantisation: per tensor, per axis and in blocks."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from regraft.frontends.onnx.operators.casts import convert
from regraft.frontends.onnx.operators.convolution import conv
from regraft.frontends.onnx.registry import operator
from regraft.frontends.onnx.values import DTYPES

LIMITS: dict[int, tuple[int, int]] = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT2: (0, 3),
    ir.DataType.INT2: (-2, 1),
    ir.DataType.INT32: (-(2**31), 2**31 - 1),
}


def spread(values: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Scales or zero points so that they broadcast over x."""
    if not values.dim() or (values.dim() == 1 and values.numel() == 1):
        return values.reshape(())
    axis = axis % x.dim()
    if values.dim() == 1 and not block:
        return values.reshape([-1 if d == axis else 1 for d in range(x.dim())])
    block = block or -(-x.shape[axis] // values.shape[axis])
    return values.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])


def type_of(tensor: Tensor | None, declared: Any) -> int:
    """The ONNX type of a zero point: what the file says, else what the tensor is."""
    if declared is not None and declared != ir.DataType.UNDEFINED:
        return declared
    if tensor is None:
        return ir.DataType.UINT8
    return next(key for key, dtype in DTYPES.items() if dtype == tensor.dtype)


def _number(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return x.to(dtype)


@operator("QuantizeLinear")
def quantize_linear(
    x, scale, zero=None, *, axis=1, block_size=0, output_dtype=0, precision=0, saturate=1, types
):
    to = output_dtype or type_of(zero, types[2] if len(types) > 2 else None)
    dtype = DTYPES[precision] if precision else scale.dtype
    if "float8" in str(dtype):
        dtype = torch.float32
    scaled = _number(x, dtype) / _number(spread(scale, x, axis, block_size), dtype)
    if to not in LIMITS:
        return convert(scaled.float(), to, bool(saturate))
    rounded = torch.round(scaled).float()
    if zero is not None:
        rounded = rounded + spread(zero.float(), x, axis, block_size)
    return rounded.clamp(*LIMITS[to]).to(torch.int64).to(DTYPES[to])


@operator("DequantizeLinear")
def dequantize_linear(x, scale, zero=None, *, axis=1, block_size=0, output_dtype=0, saturate=1):
    wide = torch.float64 if x.dtype == torch.int32 else torch.float32
    dtype = DTYPES[output_dtype] if output_dtype else scale.dtype
    values = x.to(wide)
    if zero is not None:
        values = values - spread(zero.to(wide), x, axis, block_size)
    return (values * spread(scale.to(wide), x, axis, block_size)).to(dtype)


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(x):
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    safe = torch.where(scale == 0, 1, scale)
    zero = torch.round((-low / safe).clamp(0, 255))
    y = (torch.round(x / safe) + zero).clamp(0, 255)
    return y.to(torch.uint8), scale, zero.to(torch.uint8)


def requantise(y: Tensor, scale: Tensor, zero: Tensor | None, declared: Any = None) -> Tensor:
    """y / scale + zero, rounded and saturated to the type of zero."""
    to = type_of(zero, declared)
    rounded = torch.round(y / scale.to(y.dtype))
    if zero is not None:
        rounded = rounded + zero.to(y.dtype)
    return rounded.clamp(*LIMITS[to]).to(DTYPES[to]) if to in LIMITS else rounded.to(zero.dtype)


@operator("QLinearMatMul")
def qlinear_matmul(a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero):
    def rows(v: Tensor) -> Tensor:
        return v[:, None] if v.dim() == 1 and v.numel() > 1 else v

    left = (a.double() - rows(a_zero).double()) * rows(a_scale).double()
    right = (b.double() - b_zero.double()) * b_scale.double()
    return requantise(left @ right, y_scale, y_zero)


@operator("QLinearConv")
def qlinear_conv(x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias=None, **attributes):
    shape = [-1, *[1] * (w.dim() - 1)]
    image = x.double() - x_zero.double()
    kernel = w.double() - w_zero.double().reshape(shape if w_zero.numel() > 1 else ())
    total = conv(image, kernel, None if bias is None else bias.double(), **attributes)
    scale = w_scale.double().reshape(shape[:-1] if w_scale.numel() > 1 else ())
    return requantise(total * scale * x_scale.double(), y_scale, y_zero)
