"""Grouped-query attention over a cache, with masks, windows, soft caps and sinks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    causal: bool = True,
    window: int = 0,
) -> Tensor:
    """Attend q [B, Hq, S, D] to k [B, Hkv, T, D], v [B, Hkv, T, Dv]; out [B, Hq, S, Dv].

    Queries are the last S of the T positions. mask is bool (True attends) or additive,
    broadcastable to [B, Hq, S, T]; it replaces the causal mask. A query at position p
    with window w > 0 sees keys p-w+1..p. sinks [Hq] or [B, Hq, S, 1] are extra
    softmax columns.
    """
    rows, length = q.shape[2], k.shape[2]
    if 0 < window < length:
        if rows == 1:
            k, v = k[:, :, -window:], v[:, :, -window:]
            mask = mask[..., -window:] if mask is not None else None
        else:
            mask = _join(mask, _band(rows, length, window, q.device))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    if softcap > 0 or sinks is not None:
        if mask is None and causal and rows > 1:
            mask = _band(rows, length, 0, q.device)
        return _explicit(q, k, v, mask, scale, softcap, sinks)
    if rows == 1:
        return _decode(q, k, v, mask, scale)
    square = mask is None and causal and rows == length
    if mask is None and causal and not square:
        mask = _band(rows, length, 0, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=square, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """One query row per head; the heads of a group become rows [B, Hkv, G, D]."""
    batch, heads = q.shape[:2]
    shared = k.shape[1]
    q = q.reshape(batch, shared, heads // shared, q.shape[-1])
    if mask is not None and mask.shape[1] > 1:
        mask = mask.expand(-1, heads, 1, -1).reshape(mask.shape[0], shared, -1, mask.shape[-1])
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return out.reshape(batch, heads, 1, v.shape[-1])


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    if sinks is None:
        return torch._safe_softmax(scores, -1) @ v
    sinks = sinks.view(1, -1, 1, 1) if sinks.dim() == 1 else sinks
    column = sinks.to(scores.dtype).expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ v


def _band(rows: int, length: int, window: int, device: torch.device) -> Tensor:
    """Bottom-right causal bool mask [1, 1, rows, length], banded when window > 0."""
    query = torch.arange(length - rows, length, device=device).unsqueeze(1)
    key = torch.arange(length, device=device)
    allowed = key <= query
    if window:
        allowed = allowed & (key > query - window)
    return allowed[None, None]


def _join(mask: Tensor | None, band: Tensor) -> Tensor:
    if mask is None:
        return band
    if mask.dtype == torch.bool:
        return mask & band
    return mask.masked_fill(~band, float("-inf"))
