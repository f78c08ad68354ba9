"""Shapes, indexing and movement."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.frontends.onnx.registry import operator
from regraft.frontends.onnx.values import (
    DTYPES,
    SMALL,
    Host,
    as_numbers,
    host,
    is_strings,
    strings,
)


@operator("Shape")
def shape(x, *, start=0, end=None):
    return host(list(x.shape)[start:end])


@operator("Size")
def size(x):
    return host(math.prod(x.shape))


@operator("Identity", raw=True)
def identity(x):
    return x


@operator("Reshape", host=(1,))
def reshape(x, shape, *, allowzero=0):
    if not allowzero:
        shape = [x.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(shape)]
    if is_strings(x):
        return strings(x.values.reshape(shape))
    return x.reshape(shape)


@operator("Flatten")
def flatten(x, *, axis=1):
    axis = axis % x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Transpose")
def transpose(x, *, perm=None):
    return x.permute(tuple(perm) if perm else tuple(reversed(range(x.dim()))))


@operator("Squeeze", host=(1,))
def squeeze(x, axes=None):
    if axes is None:
        axes = [d for d, n in enumerate(x.shape) if n == 1]
    return x.squeeze(tuple(axes)) if axes else x


@operator("Unsqueeze", host=(1,))
def unsqueeze(x, axes):
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Concat")
def concat(*inputs, axis=1):
    if any(map(is_strings, inputs)):
        return strings(np.concatenate([x.values for x in inputs], axis))
    return torch.cat(inputs, axis)


@operator("Split", host=(1,))
def split(x, split=None, *, axis=0, num_outputs=None, outputs):
    if split is None:
        part = -(-x.shape[axis] // (num_outputs or outputs))
        return tuple(
            x.narrow(axis, i * part, min(part, x.shape[axis] - i * part)) for i in range(outputs)
        )
    return tuple(torch.split(x, list(split), axis))


@operator("Slice", host=(1, 2, 3, 4))
def slice_(x, starts, ends, axes=None, steps=None):
    axes = range(len(starts)) if axes is None else axes
    for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(starts), strict=True):
        if step > 0:
            index: list[Any] = [slice(None)] * x.dim()
            index[axis] = slice(_bound(start), _bound(end), step)
            x = x[tuple(index)]
        else:
            x = _backwards(x, axis, start, end, step)
    return x


def _bound(value: Any) -> Any:
    if not isinstance(value, int):
        return value
    return max(min(value, sys.maxsize), -sys.maxsize)


def _backwards(x: Tensor, axis: int, start: int, end: int, step: int) -> Tensor:
    count = x.shape[axis]
    if isinstance(count, int):
        chosen = range(count)[slice(start, end if end >= -count else None, step)]
        return x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64, device=x.device))
    if start not in (-1, sys.maxsize) or end > -sys.maxsize // 2:
        raise NotImplementedError("a slice backwards of a dynamic size must be the whole of it")
    return x.flip(axis) if step == -1 else slice_(x.flip(axis), [0], [sys.maxsize], [axis], [-step])


@operator("Gather")
def gather(x, indices, *, axis=0):
    if is_strings(x):
        return strings(np.take(x.values, indices.numpy(), axis))
    axis = axis % x.dim()
    indices = indices.to(torch.int64)
    if not indices.dim():
        return x.index_select(axis, _positive(indices.reshape(1), x.shape[axis])).squeeze(axis)
    if indices.dim() == 1:
        return x.index_select(axis, _positive(indices, x.shape[axis]))
    chosen = x.index_select(axis, _positive(indices.flatten(), x.shape[axis]))
    return chosen.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _positive(indices: Tensor, count: Any) -> Tensor:
    return torch.where(indices < 0, indices + count, indices)


@operator("GatherElements")
def gather_elements(x, indices, *, axis=0):
    return torch.gather(x, axis, _positive(indices.to(torch.int64), x.shape[axis]))


@operator("GatherND")
def gather_nd(x, indices, *, batch_dims=0):
    indices = indices.to(torch.int64)
    lead = [
        torch.arange(n, device=indices.device).reshape(
            [-1 if i == d else 1 for i in range(indices.dim() - 1)]
        )
        for d, n in enumerate(x.shape[:batch_dims])
    ]
    return x[(*lead, *indices.unbind(-1))]


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("Scatter", "ScatterElements")
def scatter_elements(x, indices, updates, *, axis=0, reduction="none"):
    indices = _positive(indices.to(torch.int64), x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, _REDUCTIONS[reduction])


@operator("ScatterND")
def scatter_nd(x, indices, updates, *, reduction="none"):
    index = indices.to(torch.int64).unbind(-1)
    if reduction == "none":
        return x.index_put(index, updates)
    if reduction == "add":
        return x.index_put(index, updates, accumulate=True)
    flat = torch.zeros_like(index[0])
    for position, count in zip(index, x.shape, strict=False):
        flat = flat * count + _positive(position, count)
    rest = x.shape[len(index) :]
    rows = x.reshape(-1, *rest)
    made = rows.scatter_reduce(
        0,
        flat.reshape(-1, *[1] * len(rest)).expand(-1, *rest),
        updates.reshape(-1, *rest),
        _REDUCTIONS[reduction],
    )
    return made.reshape(x.shape)


@operator("TensorScatter")
def tensor_scatter(past, update, write_indices=None, *, axis=-2, mode="linear"):
    axis = axis % past.dim()
    batch, length = past.shape[0], update.shape[axis]
    start = torch.zeros(batch, dtype=torch.int64) if write_indices is None else write_indices
    index = start[:, None] + torch.arange(length, device=past.device)
    if mode == "circular":
        index = index % past.shape[axis]
    index = index.reshape([batch, *[1] * (axis - 1), length, *[1] * (past.dim() - axis - 1)])
    return past.scatter(axis, index.expand(update.shape), update)


@operator("Expand", host=(1,))
def expand(x, shape):
    shape = [1] * (x.dim() - len(shape)) + list(shape)
    own = [1] * (len(shape) - x.dim()) + list(x.shape)
    sizes = [a if isinstance(n, int) and n == 1 else n for a, n in zip(own, shape, strict=True)]
    return x.expand(sizes)


@operator("Tile", host=(1,))
def tile(x, repeats):
    return x.repeat(tuple(repeats))


@operator("ConstantOfShape", host=(0,))
def constant_of_shape(sizes, *, value=None):
    value = torch.zeros(1) if value is None else value
    fixed = all(isinstance(n, int) for n in sizes)
    integral = not (value.is_floating_point() or value.is_complex())
    if fixed and integral and math.prod(sizes) <= SMALL and len(sizes) < 2:
        array = np.empty(sizes, dtype=object)
        array[...] = value.item()
        return Host(array, value.dtype)
    return torch.full(sizes, value.item(), dtype=value.dtype)


@operator("Range", raw=True)
def range_(start, limit, delta, *, stash_type=None):
    first, end, step = (as_numbers(x)[0] for x in (start, limit, delta))
    if start.dtype.is_floating_point:
        count = max(math.ceil((end - first) / step), 0)
        return (torch.arange(count, dtype=torch.float64) * step + first).to(start.dtype)
    return torch.arange(first, end, step).to(start.dtype)


@operator("EyeLike")
def eye_like(x, *, dtype=None, k=0):
    wanted = DTYPES[dtype] if dtype else x.dtype
    rows, columns = torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])
    return (columns - rows == k).to(wanted)


@operator("Trilu", host=(1,))
def trilu(x, k=None, *, upper=1):
    diagonal = k[0] if k else 0
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@operator("OneHot", host=(1,), widen=True)
def one_hot(indices, depth, values, *, axis=-1):
    count = int(depth[0]) if isinstance(depth[0], float) else depth[0]
    off, on = values.unbind(0)
    wide = indices.to(torch.int64)
    hot = _positive(wide, count).unsqueeze(-1) == torch.arange(count, device=indices.device)
    made = torch.where(hot, on, off)
    return made.movedim(-1, axis)


@operator("NonZero")
def non_zero(x):
    return x.reshape(1).nonzero().t() if not x.dim() else x.nonzero().t()


@operator("Compress")
def compress(x, condition, *, axis=None):
    if axis is None:
        x, axis = x.flatten(), 0
    return x.index_select(axis, condition.nonzero().flatten())


@operator("Unique")
def unique(x, *, axis=None, sorted=1):
    values, inverse, counts = torch.unique(
        x, return_inverse=True, return_counts=True, dim=axis, sorted=True
    )
    inverse = inverse.flatten()
    first = torch.full_like(counts, inverse.numel()).scatter_reduce(
        0, inverse, torch.arange(inverse.numel()), "amin"
    )
    if not sorted:
        order = first.argsort()
        values = values.index_select(0 if axis is None else axis, order)
        first, counts, inverse = first[order], counts[order], order.argsort()[inverse]
    return values, first, inverse, counts


@operator("ReverseSequence", host=(1,))
def reverse_sequence(x, lengths, *, batch_axis=1, time_axis=0):
    data = x.movedim((batch_axis, time_axis), (0, 1))
    rows = [torch.cat([row[:n].flip(0), row[n:]]) for row, n in zip(data, lengths, strict=True)]
    return torch.stack(rows).movedim((0, 1), (batch_axis, time_axis))


@operator("Pad", host=(1, 2, 3))
def pad(x, pads, value=None, axes=None, *, mode="constant"):
    axes = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes]
    before, after = pads[: len(axes)], pads[len(axes) :]
    if isinstance(value, (list, tuple)):
        value = value[0] if value else 0
    wide: list[Any] = [0] * (2 * x.dim())
    for axis, low, high in zip(axes, before, after, strict=True):
        wide[2 * (x.dim() - 1 - axis) : 2 * (x.dim() - 1 - axis) + 2] = [low, high]
    if mode == "constant":
        return constant_pad(x, wide, value or 0)
    for axis, low, high in zip(axes, before, after, strict=True):
        x = _mirrored(x, axis, low, high, mode)
    return x


def constant_pad(x: Tensor, wide: list[Any], value: Any) -> Tensor:
    """x padded as torch lists sizes, last dimension first; unsigned types too."""
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return F.pad(x.to(torch.int64), wide, value=value).to(x.dtype)
    return F.pad(x, wide, value=value)


def _mirrored(x: Tensor, axis: int, low: Any, high: Any, mode: str) -> Tensor:
    count = x.shape[axis]
    index = torch.arange(-low, count + high, device=x.device)
    if mode == "edge":
        index = index.clamp(0, count - 1)
    elif mode == "wrap":
        index = index % count
    else:
        period = max(2 * (count - 1), 1)
        index = (index % period + period) % period
        index = torch.where(index >= count, period - index, index)
    return x.index_select(axis, index)


@operator("CenterCropPad", host=(1,))
def center_crop_pad(x, shape, *, axes=None):
    for axis, want in zip(axes or range(x.dim()), shape, strict=True):
        have = x.shape[axis]
        if want < have:
            x = x.narrow(axis, (have - want) // 2, want)
        else:
            low = (want - have) // 2
            x = pad(x, [low, want - have - low], axes=[axis])
    return x


@operator("DepthToSpace")
def depth_to_space(x, *, blocksize, mode="DCR"):
    n, c, h, w = x.shape
    b, depth = blocksize, c // blocksize**2
    if mode == "DCR":
        x = x.reshape(n, b, b, depth, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, depth, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, depth, h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(x, *, blocksize, mode="DCR"):
    n, c, h, w = x.shape
    b = blocksize
    x = x.reshape(n, c, h // b, b, w // b, b)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.permute(order).reshape(n, c * b * b, h // b, w // b)
