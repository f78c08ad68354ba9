"""Normalisations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.frontends.onnx.registry import operator


def _channels(weight: Tensor, x: Tensor) -> Tensor:
    return weight.reshape(-1, *[1] * (x.dim() - 2))


@operator("BatchNormalization")
def batch_normalization(
    x, scale, bias, mean, variance, *, epsilon=1e-5, momentum=0.9, training_mode=0, spatial=1,
    is_test=1, outputs=1,
):  # fmt: skip
    if not training_mode:
        return (F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon),) * outputs
    dims = [0, *range(2, x.dim())]
    now, spread = x.mean(dims), x.var(dims, correction=0)
    y = F.batch_norm(x, now, spread, scale, bias, False, 0.0, epsilon)
    return (
        y,
        mean * momentum + now * (1 - momentum),
        variance * momentum + spread * (1 - momentum),
    )


@operator("InstanceNormalization")
def instance_normalization(x, scale, bias, *, epsilon=1e-5):
    dims = tuple(range(2, x.dim()))
    mean, variance = x.mean(dims, keepdim=True), x.var(dims, correction=0, keepdim=True)
    normal = (x - mean) * torch.rsqrt(variance + epsilon)
    return normal * _channels(scale, x) + _channels(bias, x)


@operator("LayerNormalization")
def layer_normalization(x, scale, bias=None, *, axis=-1, epsilon=1e-5, stash_type=1, outputs=1):
    axis = axis % x.dim()
    sizes = x.shape[axis:]
    if outputs == 1 and scale.shape == sizes and (bias is None or bias.shape == sizes):
        return F.layer_norm(x, sizes, scale, bias, epsilon)
    dims = tuple(range(axis, x.dim()))
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mean = wide.mean(dims, keepdim=True)
    deviation = torch.rsqrt((wide - mean).square().mean(dims, keepdim=True) + epsilon)
    y = ((wide - mean) * deviation).to(x.dtype) * scale
    return (y if bias is None else y + bias), mean, deviation


@operator("RMSNormalization")
def rms_normalization(x, scale, *, axis=-1, epsilon=1e-5, stash_type=1):
    dims = tuple(range(axis % x.dim(), x.dim()))
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    normal = wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    return normal.to(x.dtype) * scale


@operator("GroupNormalization", since=18)
def group_normalization_18(x, scale, bias, *, epsilon=1e-5, num_groups):
    repeat = x.shape[1] // num_groups
    scale, bias = scale.repeat_interleave(repeat), bias.repeat_interleave(repeat)
    return F.group_norm(x, num_groups, scale, bias, epsilon)


@operator("GroupNormalization", since=21)
def group_normalization(x, scale, bias, *, epsilon=1e-5, num_groups, stash_type=1):
    return F.group_norm(x, num_groups, scale, bias, epsilon)


@operator("LRN")
def lrn(x, *, alpha=0.0001, beta=0.75, bias=1.0, size):
    channels = x.shape[1]
    low = (size - 1) // 2
    squares = F.pad((x * x).movedim(1, -1), (low, size - 1 - low))
    total = squares.unfold(-1, size, 1).sum(-1)[..., :channels].movedim(-1, 1)
    return x / (bias + alpha / size * total) ** beta


@operator("LpNormalization")
def lp_normalization(x, *, axis=-1, p=2):
    norm = x.abs().sum(axis, keepdim=True) if p == 1 else x.square().sum(axis, keepdim=True).sqrt()
    return torch.where(norm == 0, 0, x / norm)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(x, *, axes=(0, 2, 3)):
    mean = x.mean(tuple(axes), keepdim=True)
    spread = (x - mean).square().mean(tuple(axes), keepdim=True).sqrt()
    return (x - mean) / (spread + 1e-9)
