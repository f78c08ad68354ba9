"""Convolutions of any number of spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.frontends.onnx.operators.image import sample
from regraft.frontends.onnx.registry import operator


def padding(
    sizes: Sequence[Any],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
) -> tuple[list[Any], list[Any]]:
    """What to add before and after each spatial dimension."""
    count = len(kernel)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            torch.sym_max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
        ]
        low = [t // 2 if auto_pad == "SAME_UPPER" else t - t // 2 for t in total]
        return low, [t - b for t, b in zip(total, low, strict=True)]
    if pads is None or auto_pad == "VALID":
        return [0] * count, [0] * count
    return list(pads[:count]), list(pads[count:])


def pad(x: Tensor, low: Sequence[Any], high: Sequence[Any], value: Any = 0) -> Tensor:
    """x with its last dimensions padded."""
    if not any(isinstance(n, torch.SymInt) or n for n in (*low, *high)):
        return x
    wide = [n for pair in zip(reversed(low), reversed(high), strict=True) for n in pair]
    return F.pad(x, wide, value=value)


@operator("Conv")
def conv(
    x, weight, bias=None, *, auto_pad="NOTSET", dilations=None, group=1, kernel_shape=None,
    pads=None, strides=None,
):  # fmt: skip
    kernel = weight.shape[2:]
    count = len(kernel)
    strides, dilations = strides or [1] * count, dilations or [1] * count
    low, high = padding(x.shape[2:], kernel, strides, dilations, pads, auto_pad)
    same = all(isinstance(a, int) and a == b for a, b in zip(low, high, strict=True))
    if not same:
        x, low = pad(x, low, high), [0] * count
    return _conv(count)(x, weight, bias, tuple(strides), tuple(low), tuple(dilations), group)


def _conv(count: int) -> Any:
    if count not in (1, 2, 3):
        raise NotImplementedError(f"a convolution over {count} dimensions")
    return (F.conv1d, F.conv2d, F.conv3d)[count - 1]


@operator("ConvTranspose")
def conv_transpose(
    x, weight, bias=None, *, auto_pad="NOTSET", dilations=None, group=1, kernel_shape=None,
    output_padding=None, output_shape=None, pads=None, strides=None,
):  # fmt: skip
    kernel = weight.shape[2:]
    count = len(kernel)
    strides, dilations = strides or [1] * count, dilations or [1] * count
    extra = list(output_padding or [0] * count)
    sizes = x.shape[2:]
    full = [
        (n - 1) * s + (k - 1) * d + 1 + e
        for n, k, s, d, e in zip(sizes, kernel, strides, dilations, extra, strict=True)
    ]
    low, high = list((pads or [0] * 2 * count)[:count]), list((pads or [0] * 2 * count)[count:])
    if output_shape or auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        wanted = (output_shape or [n * s for n, s in zip(sizes, strides, strict=True)])[-count:]
        total = [torch.sym_max(f - w, 0) for f, w in zip(full, wanted, strict=True)]
        grown = [torch.sym_max(w - f, 0) for f, w in zip(full, wanted, strict=True)]
        low = [t // 2 if auto_pad != "SAME_LOWER" else t - t // 2 for t in total]
        high = [t - b - g for t, b, g in zip(total, low, grown, strict=True)]
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[count - 1]
    y = function(x, weight, None, tuple(strides), 0, 0, group, tuple(dilations))
    y = pad(y, [-n for n in low], [e - n for e, n in zip(extra, high, strict=True)])
    return y if bias is None else y + bias.reshape(-1, *[1] * count)


@operator("ConvInteger")
def conv_integer(x, weight, x_zero=None, weight_zero=None, **attributes):
    x, weight = x.to(torch.int32), weight.to(torch.int32)
    if x_zero is not None:
        x = x - x_zero.to(torch.int32)
    if weight_zero is not None:
        zero = weight_zero.to(torch.int32)
        weight = (
            weight - zero.reshape(-1, *[1] * (weight.dim() - 1)) if zero.dim() else weight - zero
        )
    # exact: sums of products of bytes are far below 2**53
    return conv(x.double(), weight.double(), **attributes).round().to(torch.int32)


@operator("CausalConvWithState")
def causal_conv(x, weight, bias=None, past=None, *, activation="none"):
    keep = weight.shape[-1] - 1
    joined = F.pad(x, (keep, 0)) if past is None else torch.cat([past, x], -1)
    y = F.conv1d(joined, weight, bias, groups=weight.shape[0])
    y = y if activation == "none" else F.silu(y)
    return y, joined[..., joined.shape[-1] - keep :]


@operator("Col2Im", host=(1, 2))
def col2im(x, image_shape, block_shape, *, dilations=None, pads=None, strides=None):
    count = len(block_shape)
    strides, dilations = strides or [1] * count, dilations or [1] * count
    pads = pads or [0] * 2 * count
    padded = [n + pads[i] + pads[i + count] for i, n in enumerate(image_shape)]
    n, c = x.shape[0], x.shape[1] // math.prod(block_shape)
    places = torch.zeros(1, 1, dtype=torch.int64, device=x.device)
    for size, block, stride, dilation in zip(padded, block_shape, strides, dilations, strict=True):
        steps = (size - (block - 1) * dilation - 1) // stride + 1
        line = torch.arange(block)[:, None] * dilation + torch.arange(steps) * stride
        places = (places[:, None, :, None] * size + line[None, :, None, :]).flatten(2).flatten(0, 1)
    flat = x.new_zeros(n, c, math.prod(padded))
    flat = flat.index_add(2, places.flatten(), x.reshape(n, c, -1))
    image = flat.reshape(n, c, *padded)
    return pad(image, [-p for p in pads[:count]], [-p for p in pads[count:]])


@operator("DeformConv")
def deform_conv(
    x, weight, offset, bias=None, mask=None, *, dilations=None, group=1, kernel_shape=None,
    offset_group=1, pads=None, strides=None,
):  # fmt: skip
    n, channels, height, width = x.shape
    kh, kw = weight.shape[2:]
    strides, dilations, pads = strides or [1, 1], dilations or [1, 1], pads or [0] * 4
    oh, ow = offset.shape[-2:]
    shift = offset.reshape(n, offset_group, kh * kw, 2, oh, ow)
    grid = (torch.arange(oh) * strides[0] - pads[0], torch.arange(ow) * strides[1] - pads[1])
    tap = (torch.arange(kh) * dilations[0], torch.arange(kw) * dilations[1])
    taps = torch.stack(torch.meshgrid(*tap, indexing="ij"), 0).reshape(2, kh * kw, 1, 1)
    rows = grid[0].reshape(1, oh, 1) + taps[0] + shift[:, :, :, 0]
    columns = grid[1].reshape(1, 1, ow) + taps[1] + shift[:, :, :, 1]
    part = channels // offset_group
    parts = x.reshape(n * offset_group, part, height, width)
    points = (place.reshape(n * offset_group, -1) for place in (rows, columns))
    pixels, weights = sample(parts, *points)
    taken = (pixels * weights).sum(0).reshape(n, offset_group, part, kh * kw, oh, ow)
    if mask is not None:
        taken = taken * mask.reshape(n, offset_group, 1, kh * kw, oh, ow)
    taken = taken.reshape(n, group, channels // group * kh * kw, oh * ow)
    kernels = weight.reshape(group, weight.shape[0] // group, -1)
    y = (kernels @ taken).reshape(n, weight.shape[0], oh, ow)
    return y if bias is None else y + bias.reshape(-1, 1, 1)
