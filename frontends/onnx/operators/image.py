"""Resampling and other operators on images."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.frontends.onnx.registry import operator


@operator("Resize", since=11, host=(1, 2, 3))
def resize(
    x, roi=None, scales=None, sizes=None, *, antialias=0, axes=None,
    coordinate_transformation_mode="half_pixel", cubic_coeff_a=-0.75, exclude_outside=0,
    extrapolation_value=0.0, keep_aspect_ratio_policy="stretch", mode="nearest",
    nearest_mode="round_prefer_floor",
):  # fmt: skip
    axes = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes]
    crop = coordinate_transformation_mode == "tf_crop_and_resize"
    spans = [1.0] * len(axes)
    if crop:
        spans = [roi[i + len(axes)] - roi[i] for i in range(len(axes))]
    if sizes:
        wanted = list(sizes)
        factors = [m / x.shape[axis] for m, axis in zip(wanted, axes, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            common = (min if keep_aspect_ratio_policy == "not_larger" else max)(factors)
            factors = [common] * len(axes)
            wanted = [math.floor(common * x.shape[axis] + 0.5) for axis in axes]
    else:
        factors = list(scales)
        wanted = [
            x.shape[a] * int(s) if s * span == int(s) else math.floor(x.shape[a] * span * s)
            for a, s, span in zip(axes, factors, spans, strict=True)
        ]
    dtype = x.dtype
    y = x if mode == "nearest" or x.is_floating_point() else x.float()
    outside = None
    for i, (axis, count, scale) in enumerate(zip(axes, wanted, factors, strict=True)):
        if not crop and isinstance(scale, (int, float)) and scale == 1 and not sizes:
            continue
        bounds = (roi[i], roi[i + len(axes)]) if crop else (0.0, 1.0)
        place = _places(coordinate_transformation_mode, y.shape[axis], count, scale, bounds)
        if crop:
            beyond = (place < 0) | (place > y.shape[axis] - 1)
            beyond = beyond.reshape([-1 if d == axis else 1 for d in range(x.dim())])
            outside = beyond if outside is None else outside | beyond
        if mode == "nearest":
            y = y.index_select(axis, _nearest(place, nearest_mode, y.shape[axis]))
        else:
            stretch = min(scale, 1.0) if antialias else 1.0
            y = _interpolate(y, axis, place, mode, stretch, cubic_coeff_a, bool(exclude_outside))
    if outside is not None:
        y = y.masked_fill(outside, extrapolation_value)
    return y if y.dtype == dtype else _rounded(y, dtype)


def _rounded(y: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.iinfo(dtype)
    return y.round().clamp(info.min, info.max).to(dtype)


def _places(mode: str, size: Any, count: Any, scale: Any, bounds: tuple[float, float]) -> Tensor:
    """Where in the input each output position lies."""
    i = torch.arange(count, dtype=torch.float64)
    if mode == "align_corners":
        return i * ((size - 1) / (count - 1)) if count != 1 else i * 0
    if mode == "asymmetric":
        return i / scale
    if mode == "tf_half_pixel_for_nn":
        return (i + 0.5) / scale
    if mode == "tf_crop_and_resize":
        start, end = bounds
        if count == 1:
            return i + 0.5 * (start + end) * (size - 1)
        return start * (size - 1) + i * ((end - start) * (size - 1) / (count - 1))
    if mode == "pytorch_half_pixel" and count == 1:
        return i * 0
    half = (i + 0.5) / scale - 0.5
    if mode == "half_pixel_symmetric":
        return half + size / 2 * (1 - count / (scale * size))
    return half


def _nearest(place: Tensor, mode: str, size: Any) -> Tensor:
    if mode == "floor":
        index = place.floor()
    elif mode == "ceil":
        index = place.ceil()
    elif mode == "round_prefer_ceil":
        index = (place + 0.5).floor()
    else:
        index = (place - 0.5).ceil()
    return index.to(torch.int64).clamp(0, size - 1)


def _interpolate(
    x: Tensor, axis: int, place: Tensor, mode: str, stretch: float, a: float, exclude: bool
) -> Tensor:
    size, reach = x.shape[axis], 1 if mode == "linear" else 2
    first = math.floor(-reach / stretch) + 1
    base = place.floor()
    taps = torch.arange(first, 2 - first, dtype=torch.float64)
    index = base[:, None] + taps
    distance = ((place - base)[:, None] - taps).abs() * stretch
    weight = (1 - distance).clamp(min=0) if mode == "linear" else _cubic(distance, a)
    if exclude:
        weight = torch.where((index < 0) | (index > size - 1), 0, weight)
    weight = (weight / weight.sum(1, keepdim=True)).to(x.dtype)
    index = index.to(torch.int64).clamp(0, size - 1)
    shape = [-1 if d == axis else 1 for d in range(x.dim())]
    parts = [
        x.index_select(axis, index[:, k]) * weight[:, k].reshape(shape)
        for k in range(weight.shape[1])
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _cubic(d: Tensor, a: float) -> Tensor:
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0))


@operator("Resize", since=10, host=(1,))
@operator("Upsample", host=(1,))
def upsample(x, scales, *, mode="nearest"):
    kind = "linear" if "linear" in mode else mode
    return resize(
        x, None, scales, mode=kind, coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )  # fmt: skip


@operator("GridSample")
def grid_sample(x, grid, *, align_corners=0, mode="linear", padding_mode="zeros"):
    names = {"linear": "bilinear", "cubic": "bicubic"}
    return F.grid_sample(x, grid, names.get(mode, mode), padding_mode, bool(align_corners))


@operator("AffineGrid", host=(1,))
def affine_grid(theta, size, *, align_corners=0):
    return F.affine_grid(theta, list(size), bool(align_corners))


def sample(x: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The four pixels [4, batch, channels, points] of x [batch, channels, height, width] around
    each point [batch, points], zero outside, and their weights [4, batch, 1, points]."""
    height, width = x.shape[2:]
    top, left = rows.floor(), columns.floor()
    pixels, weights = [], []
    for down in (0, 1):
        for right in (0, 1):
            r, c = top + down, left + right
            inside = (r >= 0) & (r <= height - 1) & (c >= 0) & (c <= width - 1)
            index = r.clamp(0, height - 1) * width + c.clamp(0, width - 1)
            index = index.to(torch.int64)[:, None].expand(-1, x.shape[1], -1)
            pixels.append(x.flatten(2).gather(2, index))
            share = (1 - (rows - r).abs()) * (1 - (columns - c).abs())
            weights.append(torch.where(inside, share, 0)[:, None].to(x.dtype))
    return torch.stack(pixels), torch.stack(weights)


def _roi_align(x, rois, batches, half, mode, height, width, ratio, scale):
    made = []
    for roi, batch in zip(rois.tolist(), batches.tolist(), strict=True):
        shift = 0.5 if half else 0.0
        left, top, right, bottom = (corner * scale - shift for corner in roi)
        wide, high = right - left, bottom - top
        if not half:
            wide, high = max(wide, 1.0), max(high, 1.0)
        lines = (_line(top, high, height, ratio), _line(left, wide, width, ratio))
        (rows, down), (columns, across) = lines
        rows, bad_rows = _inside(rows, x.shape[2])
        columns, bad_columns = _inside(columns, x.shape[3])
        grid = torch.meshgrid(rows, columns, indexing="ij")
        pixels, weights = sample(x[batch][None], *(g.reshape(1, -1) for g in grid))
        bad = (bad_rows[:, None] | bad_columns).reshape(1, -1)
        parts = (pixels * weights).masked_fill(bad, 0)[:, 0]
        parts = parts if mode == "max" else parts.sum(0, keepdim=True)
        parts = parts.unflatten(-1, (height, down, width, across))
        made.append(parts.amax((0, 3, 5)) if mode == "max" else parts[0].mean((2, 4)))
    return torch.stack(made) if made else x.new_zeros(0, x.shape[1], height, width)


def _line(start: float, length: float, count: int, ratio: int) -> tuple[Tensor, int]:
    points = ratio if ratio > 0 else max(math.ceil(length / count), 1)
    steps = (torch.arange(count * points, dtype=torch.float64) + 0.5) / points
    return start + steps * (length / count), points


def _inside(place: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return place.clamp(0, size - 1), (place < -1) | (place > size)


@operator("RoiAlign", since=10)
def roi_align_10(
    x, rois, batches, *, mode="avg", output_height=1, output_width=1, sampling_ratio=0,
    spatial_scale=1.0,
):  # fmt: skip
    return _roi_align(
        x, rois, batches, False, mode, output_height, output_width, sampling_ratio, spatial_scale
    )


@operator("RoiAlign", since=16)
def roi_align(
    x, rois, batches, *, coordinate_transformation_mode="half_pixel", mode="avg", output_height=1,
    output_width=1, sampling_ratio=0, spatial_scale=1.0,
):  # fmt: skip
    half = coordinate_transformation_mode == "half_pixel"
    return _roi_align(
        x, rois, batches, half, mode, output_height, output_width, sampling_ratio, spatial_scale
    )


@operator("NonMaxSuppression", host=(2, 3, 4))
def non_max_suppression(boxes, scores, most=None, overlap=None, least=None, *, center_point_box=0):
    limit, share = (most or [0])[0], (overlap or [0.0])[0]
    kept = []
    for batch in range(boxes.shape[0]):
        corners = _corners(boxes[batch].double(), center_point_box)
        shared = _overlaps(corners)
        for label in range(scores.shape[1]):
            score = scores[batch, label]
            order = score.argsort(descending=True, stable=True).tolist()
            chosen: list[int] = []
            for index in order:
                if len(chosen) >= limit or (least and score[index] <= least[0]):
                    break
                if all(shared[index, other] <= share for other in chosen):
                    chosen.append(index)
            kept += [(batch, label, index) for index in chosen]
    return torch.tensor(kept, dtype=torch.int64).reshape(-1, 3)


def _corners(boxes: Tensor, center: int) -> Tensor:
    if center:
        x, y, w, h = boxes.unbind(-1)
        return torch.stack([y - h / 2, x - w / 2, y + h / 2, x + w / 2], -1)
    first, second = boxes.split(2, -1)
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)


def _overlaps(boxes: Tensor) -> Tensor:
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return shared / (area[:, None] + area - shared).clamp(min=1e-300)


@operator("ImageDecoder")
def image_decoder(data, *, pixel_format="RGB"):
    from PIL import Image

    image = Image.open(io.BytesIO(data.numpy().tobytes()))
    if pixel_format == "Grayscale":
        return torch.from_numpy(np.array(image.convert("L"))[..., None])
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels[..., ::-1].copy() if pixel_format == "BGR" else pixels)
