"""Pooling over windows and over everything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.frontends.onnx.operators.convolution import pad, padding
from regraft.frontends.onnx.registry import operator


class _Windows:
    """The windows that a pooling operator slides over the spatial dimensions of x."""

    def __init__(
        self, x: Tensor, kernel: Sequence[int], strides: Any, dilations: Any, pads: Any,
        auto_pad: str, ceil_mode: int,
    ) -> None:  # fmt: skip
        count = len(kernel)
        self.x, self.kernel = x, list(kernel)
        self.strides, self.dilations = strides or [1] * count, dilations or [1] * count
        self.sizes = x.shape[2:]
        self.low, self.high = padding(
            self.sizes, kernel, self.strides, self.dilations, pads, auto_pad
        )
        self.spans = [(k - 1) * d + 1 for k, d in zip(kernel, self.dilations, strict=True)]
        # how far a last window reaches over the padded end
        self.beyond = [0] * count
        if ceil_mode:
            for i, (n, span, stride) in enumerate(
                zip(self.sizes, self.spans, self.strides, strict=True)
            ):
                whole = n + self.low[i] + self.high[i] - span
                steps = -(-whole // stride)
                if steps * stride >= n + self.low[i]:
                    steps -= 1  # a window must not begin in the padding after the end
                self.beyond[i] = steps * stride - whole if steps * stride > whole else 0

    @property
    def native(self) -> bool:
        """Whether torch's own pooling does the same."""
        even = all(isinstance(a, int) and a == b for a, b in zip(self.low, self.high, strict=True))
        small = all(2 * a <= k for a, k in zip(self.low, self.kernel, strict=True))
        return even and small and not any(self.beyond) and self.x.is_floating_point()

    def view(self, x: Tensor, value: Any) -> Tensor:
        """[batch, channels, *steps, *kernel]"""
        high = [h + b for h, b in zip(self.high, self.beyond, strict=True)]
        x = pad(x, self.low, high, value)
        count = len(self.kernel)
        for i, (span, stride) in enumerate(zip(self.spans, self.strides, strict=True)):
            x = x.unfold(2 + i, span, stride)
        index: Any = (..., *(slice(None, None, d) for d in self.dilations))
        return x[index] if count else x


def _function(name: str, count: int) -> Any:
    if count not in (1, 2, 3):
        return None
    return getattr(F, f"{name}{count}d")


@operator("MaxPool")
def max_pool(
    x, *, auto_pad="NOTSET", ceil_mode=0, dilations=None, kernel_shape, pads=None,
    storage_order=0, strides=None, outputs,
):  # fmt: skip
    windows = _Windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    count = len(kernel_shape)
    function = _function("max_pool", count)
    if outputs == 1 and windows.native and function:
        return function(
            x, kernel_shape, tuple(windows.strides), tuple(windows.low), tuple(windows.dilations)
        )
    wide = x if x.is_floating_point() else x.to(torch.int64)
    least = -math.inf if wide.is_floating_point() else torch.iinfo(torch.int64).min
    values, found = windows.view(wide, least).flatten(-count).max(-1)
    if outputs == 1:
        return values.to(x.dtype)
    places = torch.arange(math.prod(x.shape), dtype=torch.int64).reshape(x.shape)
    if storage_order:
        order = [0, 1, *reversed(range(2, x.dim()))]
        turned = places.reshape([x.shape[d] for d in order])
        places = turned.permute(order)
    indices = windows.view(places, 0).flatten(-count).gather(-1, found[..., None]).squeeze(-1)
    return values.to(x.dtype), indices


@operator("AveragePool")
def average_pool(
    x, *, auto_pad="NOTSET", ceil_mode=0, count_include_pad=0, dilations=None, kernel_shape,
    pads=None, strides=None,
):  # fmt: skip
    windows = _Windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    count = len(kernel_shape)
    function = _function("avg_pool", count)
    plain = all(d == 1 for d in windows.dilations)
    if windows.native and plain and function:
        return function(
            x, kernel_shape, tuple(windows.strides), tuple(windows.low),
            count_include_pad=bool(count_include_pad),
        )  # fmt: skip
    total = windows.view(x, 0).flatten(-count).sum(-1)
    ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype)
    if count_include_pad:
        ones = pad(ones, windows.low, windows.high, 1)
        windows.low, windows.high = [0] * count, [0] * count
    return total / windows.view(ones, 0).flatten(-count).sum(-1)


@operator("LpPool")
def lp_pool(
    x, *, auto_pad="NOTSET", ceil_mode=0, dilations=None, kernel_shape, p=2, pads=None,
    strides=None,
):  # fmt: skip
    windows = _Windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    powers = windows.view(x.abs() ** p, 0).flatten(-len(kernel_shape))
    return powers.sum(-1) ** (1 / p)


@operator("GlobalAveragePool")
def global_average_pool(x):
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(x):
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalLpPool")
def global_lp_pool(x, *, p=2):
    return (x.abs() ** p).sum(tuple(range(2, x.dim())), keepdim=True) ** (1 / p)


@operator("MaxUnpool", host=(2,))
def max_unpool(x, indices, output_shape=None, *, kernel_shape, pads=None, strides=None):
    count = len(kernel_shape)
    strides, pads = strides or [1] * count, pads or [0] * 2 * count
    sizes = [
        (n - 1) * s - pads[i] - pads[i + count] + k
        for i, (n, s, k) in enumerate(zip(x.shape[2:], strides, kernel_shape, strict=True))
    ]
    made = [*x.shape[:2], *sizes]
    flat = x.new_zeros(math.prod(made)).scatter(0, indices.flatten(), x.flatten())
    made_image = flat.reshape(made)
    if output_shape is None:
        return made_image
    return pad(
        made_image, [0] * count, [a - b for a, b in zip(output_shape[2:], sizes, strict=True)]
    )


@operator("MaxRoiPool")
def max_roi_pool(x, rois, *, pooled_shape, spatial_scale=1.0):
    height, width = pooled_shape
    made = []
    for batch, *corners in rois.tolist():
        left, top, right, bottom = (math.floor(c * spatial_scale + 0.5) for c in corners)
        rows = _bins(top, max(bottom - top + 1, 1), height, x.shape[2])
        columns = _bins(left, max(right - left + 1, 1), width, x.shape[3])
        image = x[int(batch)]
        made += [
            image[:, r0:r1, c0:c1].amax((1, 2))
            if r1 > r0 and c1 > c0
            else image.new_zeros(len(image))
            for r0, r1 in rows
            for c0, c1 in columns
        ]
    return torch.stack(made).reshape(len(rois), height, width, -1).permute(0, 3, 1, 2)


def _bins(start: int, length: int, count: int, limit: int) -> list[tuple[int, int]]:
    return [
        (
            min(max(start + i * length // count, 0), limit),
            min(max(start - (-(i + 1) * length // count), 0), limit),
        )
        for i in range(count)
    ]
