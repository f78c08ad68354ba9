"""Attention and what goes with it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.frontends.onnx.registry import operator
from regraft.frontends.onnx.values import DTYPES


def heads_of(x: Tensor, count: int) -> Tensor:
    """[batch, length, hidden] -> [batch, heads, length, size]"""
    return x.unflatten(-1, (count, x.shape[-1] // count)).transpose(1, 2)


def repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values for each query head."""
    times = heads // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, 1)


@operator("Attention", since=23)
def attention(
    q, k, v, mask=None, past_key=None, past_value=None, lengths=None, *, is_causal=0,
    kv_num_heads=None, left_window_size=-1, q_num_heads=None, qk_matmul_output_mode=0,
    right_window_size=-1, scale=None, softcap=0.0, softmax_precision=None, outputs=1,
):  # fmt: skip
    flat = q.dim() == 3
    if flat:
        q, k, v = heads_of(q, q_num_heads), heads_of(k, kv_num_heads), heads_of(v, kv_num_heads)
    past = 0
    if past_key is not None:
        past = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    seen = _seen(
        q.shape[2], k.shape[2], past, lengths, is_causal, left_window_size, right_window_size
    )
    bias = None
    if mask is not None:
        short = k.shape[2] - mask.shape[-1]
        if isinstance(short, int) and short:
            fill = False if mask.dtype == torch.bool else -math.inf
            mask = F.pad(mask, (0, short), value=fill)
        if mask.dtype == torch.bool:
            seen = mask if seen is None else seen & mask
        else:
            bias = mask
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if outputs < 4 and not softcap and lengths is None and (seen is None or bias is None):
        joined = seen if bias is None else bias
        if joined is not None and joined.dim() < 4:
            joined = joined[(None,) * (4 - joined.dim())]
        y = F.scaled_dot_product_attention(
            q, repeated(k, q.shape[1]), repeated(v, q.shape[1]), joined, 0.0, False, scale=scale
        )
        return (y.transpose(1, 2).flatten(2) if flat else y), k, v
    y, scores = _explicit(
        q, k, v, seen, bias, scale, softcap, softmax_precision, qk_matmul_output_mode
    )
    return (y.transpose(1, 2).flatten(2) if flat else y), k, v, scores


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, seen: Any, bias: Any, scale: float, softcap: float,
    precision: int | None, mode: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    root = math.sqrt(scale)
    scores = (q * root) @ (repeated(k, q.shape[1]) * root).transpose(-1, -2)
    shown = [scores]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    shown.append(scores)
    if bias is not None:
        scores = scores + bias
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    shown.append(scores)
    weights = scores.to(DTYPES[precision]) if precision else scores
    weights = torch.softmax(weights, -1).to(q.dtype)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = weights.masked_fill(empty, 0)
    shown.append(weights)
    return weights.to(v.dtype) @ repeated(v, q.shape[1]), shown[mode]


def _seen(
    queries: Any, keys: Any, past: Any, lengths: Tensor | None, causal: int, left: int, right: int
) -> Tensor | None:
    """Which keys each query sees; None for all."""
    if lengths is None and not causal and left < 0 and right < 0:
        return None
    query, key = torch.arange(queries)[:, None], torch.arange(keys)
    offset: Any = past
    seen = torch.ones(1, 1, dtype=torch.bool)
    if lengths is not None:
        count = lengths[:, None, None, None]
        seen = key < count
        offset = count - queries
    if causal:
        seen = seen & (key <= query + offset)
    if left >= 0:
        seen = seen & (key >= query + offset - left)
    if right >= 0:
        seen = seen & (key <= query + offset + right)
    return seen


@operator("FlexAttention", domain="ai.onnx.preview")
def flex_attention(q, k, v, *, prob_mod=None, scale=None, score_mod=None, softmax_precision=None):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    default = torch.float64 if q.dtype == torch.float64 else torch.float32
    dtype = DTYPES[softmax_precision] if softmax_precision else default
    scores = (q @ repeated(k, q.shape[1]).transpose(-1, -2)).to(dtype) * scale
    if score_mod is not None:
        (scores,) = score_mod(scores)
    weights = torch.softmax(scores, -1)
    if prob_mod is not None:
        (weights,) = prob_mod(weights)
    return (weights.to(v.dtype) @ repeated(v, q.shape[1])).to(q.dtype)


@operator("LinearAttention")
def linear_attention(
    query, key, value, past=None, decay=None, beta=None, *, chunk_size=64, kv_num_heads,
    q_num_heads, scale=0.0, update_rule="gated_delta",
):  # fmt: skip
    batch, length = query.shape[:2]
    q, k, v = (
        heads_of(x, n).float()
        for x, n in ((query, q_num_heads), (key, kv_num_heads), (value, kv_num_heads))
    )
    scale = scale or 1 / math.sqrt(q.shape[-1])
    state = q.new_zeros(batch, kv_num_heads, k.shape[-1], v.shape[-1])
    state = state if past is None else past.to(q.dtype)
    g = None if decay is None or "gated" not in update_rule else heads_of(decay, kv_num_heads).exp()
    rate = None
    if beta is not None and "delta" in update_rule:
        rate = beta.transpose(1, 2).expand(batch, kv_num_heads, length)[..., None].float()
    rows = []
    for t in range(length):
        kt, vt = k[:, :, t], v[:, :, t]
        if g is not None:
            state = state * g[:, :, t, :, None].float()
        if rate is not None:
            vt = rate[:, :, t] * (vt - (kt[:, :, None] @ state).squeeze(2))
        state = state + kt[..., None] * vt[:, :, None]
        rows.append(scale * (q[:, :, t, None] @ repeated(state, q_num_heads)).squeeze(2))
    out = torch.stack(rows, 1).flatten(2)
    kept = past.dtype if past is not None else query.dtype
    return out.to(query.dtype), state.to(kept)


@operator("RotaryEmbedding")
def rotary_embedding(
    x, cos, sin, positions=None, *, interleaved=0, num_heads=0, rotary_embedding_dim=0
):
    flat = x.dim() == 3
    x = heads_of(x, num_heads) if flat else x
    size = rotary_embedding_dim or x.shape[-1]
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos[:, None], sin[:, None]
    turned, rest = x[..., :size], x[..., size:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        y = torch.stack([cos * a - sin * b, sin * a + cos * b], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        y = torch.cat([cos * a - sin * b, sin * a + cos * b], -1)
    y = torch.cat([y, rest], -1)
    return y.transpose(1, 2).flatten(2) if flat else y
