"""Functions of exports by Regraft, as the operators that they were made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.frontends.onnx.registry import operator

DOMAIN = "ai.regraft"
ops = torch.ops.regraft


@operator("CausalMask", domain=DOMAIN, host=(1, 2, 3, 4))
def causal_mask(padding, queries, keys, offset, batch, *, window=0) -> Tensor:
    (queries,), (keys,), (offset,), (batch,) = queries, keys, offset, batch
    padding = None if padding is None else padding.bool()
    return ops.causal_mask(padding, queries, keys, offset, window, batch)


@operator("Attention", domain=DOMAIN)
def attention(q, k, v, mask=None, sinks=None, *, scale, softcap=0.0, causal=0) -> Tensor:
    return ops.attention(q, k, v, mask, sinks, scale, softcap, causal=bool(causal))


@operator("CachedAttention", domain=DOMAIN)
def cached_attention(
    q, k, v, past_key, past_value, mask=None, cos=None, sin=None, sinks=None,
    *, scale, softcap=0.0, interleaved=0, offset=0,
) -> tuple[Any, Any, Any]:  # fmt: skip
    style = "interleaved" if interleaved else "half"
    return ops.cached_attention(
        q, k, v, past_key, past_value, mask, cos, sin, sinks, scale, softcap, style, offset
    )


@operator("SolveTriangular", domain=DOMAIN)
def solve_triangular(a, y, *, upper, unit) -> Tensor:
    return torch.linalg.solve_triangular(a, y, upper=bool(upper), unitriangular=bool(unit))
