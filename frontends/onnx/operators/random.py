"""Random numbers from torch's generator, or from the seed that the node names."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from regraft.frontends.onnx.registry import operator
from regraft.frontends.onnx.values import DTYPES


def _generator(seed: float | None) -> torch.Generator | None:
    if seed is None:
        return None
    return torch.Generator().manual_seed(struct.unpack("<I", struct.pack("<f", seed))[0])


def _dtype(dtype: int | None, like: Tensor | None = None) -> Any:
    if dtype:
        return DTYPES[dtype]
    return torch.float32 if like is None or not like.is_floating_point() else like.dtype


@operator("RandomNormal")
def random_normal(*, dtype=1, mean=0.0, scale=1.0, seed=None, shape):
    return (torch.randn(*shape, generator=_generator(seed)) * scale + mean).to(_dtype(dtype))


@operator("RandomNormalLike")
def random_normal_like(x, *, dtype=None, mean=0.0, scale=1.0, seed=None):
    made = torch.randn(tuple(x.shape), generator=_generator(seed))
    return (made * scale + mean).to(_dtype(dtype, x))


@operator("RandomUniform")
def random_uniform(*, dtype=1, high=1.0, low=0.0, seed=None, shape):
    return (torch.rand(*shape, generator=_generator(seed)) * (high - low) + low).to(_dtype(dtype))


@operator("RandomUniformLike")
def random_uniform_like(x, *, dtype=None, high=1.0, low=0.0, seed=None):
    made = torch.rand(tuple(x.shape), generator=_generator(seed))
    return (made * (high - low) + low).to(_dtype(dtype, x))


@operator("Bernoulli")
def bernoulli(x, *, dtype=None, seed=None):
    made = torch.rand(tuple(x.shape), generator=_generator(seed)) < x
    return made.to(DTYPES[dtype] if dtype else x.dtype)


@operator("Multinomial")
def multinomial(x, *, dtype=6, sample_size=1, seed=None):
    chosen = torch.multinomial(
        torch.softmax(x.float(), -1), sample_size, True, generator=_generator(seed)
    )
    return chosen.to(DTYPES[dtype])


@operator("Dropout", host=(1, 2))
def dropout(x, ratio=None, training=None, *, seed=None, is_test=1, outputs=1):
    share = ratio if isinstance(ratio, float) else (ratio or [0.5])[0]
    if not training or not training[0] or not share:
        return (x, torch.ones_like(x, dtype=torch.bool))[:outputs] if outputs > 1 else x
    kept = torch.rand(tuple(x.shape), generator=_generator(seed)) >= share
    return torch.where(kept, x / (1 - share), 0).to(x.dtype), kept
