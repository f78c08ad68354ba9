"""com.microsoft: attention and rotary embeddings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.frontends.onnx.decoding import Decoding, decoding
from regraft.frontends.onnx.operators.attention import heads_of, repeated, rotary_embedding
from regraft.frontends.onnx.operators.microsoft import DOMAIN
from regraft.frontends.onnx.registry import operator
from regraft.program import RegraftError

ops = torch.ops.regraft


@operator("RotaryEmbedding", domain=DOMAIN)
def rotary(
    x, positions, cos, sin, *, interleaved=0, is_packed_batching=0, num_heads=0,
    rotary_embedding_dim=0, scale=1.0,
):  # fmt: skip
    length = x.shape[2] if x.dim() == 4 else x.shape[1]
    if positions.numel() == 1:
        positions = positions.reshape(1, 1) + torch.arange(length)
    heads = num_heads or (x.shape[-1] // (2 * cos.shape[-1]) if x.dim() == 3 else 0)
    positions = positions.expand(x.shape[0], length)
    return rotary_embedding(
        x, cos, sin, positions, interleaved=interleaved, num_heads=heads,
        rotary_embedding_dim=rotary_embedding_dim or 2 * cos.shape[-1],
    )  # fmt: skip


def _attended(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, bias: Tensor | None,
    softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q, k, v [batch, heads, length, size], sinks [heads] -> [batch, length, hidden]"""
    scores = (q @ repeated(k, q.shape[1]).transpose(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    scores = scores.float()
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[2]].to(v.dtype)
    return (weights @ repeated(v, q.shape[1])).transpose(1, 2).flatten(2)


def _joined(*biases: Tensor | None) -> Tensor | None:
    given = [bias for bias in biases if bias is not None]
    return sum(given[1:], given[0]) if given else None


@operator("MultiHeadAttention", domain=DOMAIN)
def multi_head_attention(
    query, key=None, value=None, bias=None, padding=None, attention_bias=None, past_key=None,
    past_value=None, *, num_heads, mask_filter_value=-10000.0, scale=0.0, unidirectional=0,
):  # fmt: skip
    if key is None or value is None:
        raise RegraftError("MultiHeadAttention with packed inputs is not supported: unpack them")
    if bias is not None:
        first, second = query.shape[-1], 2 * query.shape[-1]
        query = query + bias[:first]
        key = key + bias[first:second] if key.dim() == 3 else key
        value = value + bias[second:] if value.dim() == 3 else value
    q = heads_of(query, num_heads)
    k = heads_of(key, num_heads) if key.dim() == 3 else key
    v = heads_of(value, num_heads) if value.dim() == 3 else value
    if past_key is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    hidden = None
    if padding is not None:
        if padding.dim() == 1:
            padding = torch.arange(k.shape[2]) < padding[:, None]
        seen = padding.bool()
        seen = seen[:, None, None] if seen.dim() == 2 else seen[:, None]
        hidden = torch.where(seen, 0.0, mask_filter_value).to(q.dtype)
    causal = None
    if unidirectional:
        rows = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        causal = torch.where(torch.arange(k.shape[2]) <= rows, 0.0, -math.inf).to(q.dtype)
    return _attended(q, k, v, scale, _joined(attention_bias, hidden, causal)), k, v


@operator("GroupQueryAttention", domain=DOMAIN)
def group_query_attention(
    query, key=None, value=None, past_key=None, past_value=None, lengths=None, total=None,
    cos=None, sin=None, positions=None, attention_bias=None, sinks=None, k_scale=None,
    v_scale=None, q_norm=None, k_norm=None, *, num_heads, kv_num_heads, causal=1, do_rotary=0,
    k_norm_epsilon=None, k_quant_type="NONE", kv_cache_bit_width=0, local_window_size=-1,
    q_norm_epsilon=None, qk_norm_epsilon=1e-6, qk_output=0, rotary_interleaved=0, scale=0.0,
    sliding_window_cache=0, smooth_softmax=0, softcap=0.0, v_quant_type="NONE",
):  # fmt: skip
    """In a step that is captured, past and present hold every token in order, and padding is
    hidden wherever it lies: equal to the node for rows that it serves, those without padding or
    padded on the right."""
    if k_scale is not None or v_scale is not None:
        raise RegraftError("GroupQueryAttention over a quantized cache is not supported")
    if not causal or qk_output:
        raise RegraftError("GroupQueryAttention is supported if causal and without qk_output")
    if key is None:
        size = query.shape[-1] // (num_heads + 2 * kv_num_heads)
        sizes = [num_heads * size, kv_num_heads * size, kv_num_heads * size]
        query, key, value = query.split(sizes, -1)
    q = heads_of(query, num_heads)
    k, v = heads_of(key, kv_num_heads), heads_of(value, kv_num_heads)
    if q_norm is not None:
        q = F.rms_norm(q, q.shape[-1:], q_norm, q_norm_epsilon or qk_norm_epsilon)
        k = F.rms_norm(k, k.shape[-1:], k_norm, k_norm_epsilon or qk_norm_epsilon)
    if smooth_softmax > 0 and sinks is None:
        sinks = q.new_zeros(num_heads)
    scale = scale or 1 / math.sqrt(q.shape[-1])
    window = max(local_window_size, 0)
    step = decoding.get()
    if step is not None and any(past_key is past for past in step.past):
        turn = None
        if do_rotary:
            at = step.positions if positions is None else positions
            turn = cos[at], sin[at], "interleaved" if rotary_interleaved else "half"
        given = (q, k, v, past_key, past_value)
        return _cached(step, *given, turn, window, attention_bias, sinks, scale, softcap)
    past = 0 if past_key is None else past_key.shape[2]
    keys, queries = past + k.shape[2], q.shape[2]
    # every sequence ends at its own length: tokens lie behind what it has of the past
    begins = (lengths.reshape(-1, 1).to(torch.int64) + 1 - queries).clamp(min=0)
    places = begins + torch.arange(queries)
    if do_rotary:
        at = (places if positions is None else positions).clamp(max=cos.shape[0] - 1)
        settings = {"interleaved": rotary_interleaved, "rotary_embedding_dim": 2 * cos.shape[-1]}
        q = rotary_embedding(q, cos, sin, at, **settings)
        k = rotary_embedding(k, cos, sin, at, **settings)
    if past_key is not None:
        index = places.clamp(max=keys - 1)[:, None, :, None]
        k = _written(past_key, k, index, begins)
        v = _written(past_value, v, index, begins)
    seen = torch.arange(keys) <= places[..., None]
    if window:
        seen = seen & (torch.arange(keys) > places[..., None] - window)
    hidden = torch.where(seen, 0.0, -math.inf).to(q.dtype)[:, None]
    return _attended(q, k, v, scale, _joined(attention_bias, hidden), softcap, sinks), k, v


def _cached(
    step: Decoding, q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor,
    turn: tuple[Tensor, Tensor, str] | None, window: int, bias: Tensor | None,
    sinks: Tensor | None, scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention to a cache as the operator that passes rewrite; turn: cos, sin and style of the
    rotation, None where queries and keys are rotated before, if at all."""
    past, length = past_key.shape[2], q.shape[2]
    total = past + length
    mask = ops.causal_mask(step.mask, length, total, past, window, q.shape[0])
    if bias is not None:
        mask = torch.where(mask, bias[..., :total], -math.inf)
    if turn is None:
        key, value = ops.kv_update(past_key, k), ops.kv_update(past_value, v)
        out = ops.attention(q, key, value, mask, sinks, scale, softcap)
    else:
        cos, sin, style = turn
        out, key, value = ops.cached_attention(
            q, k, v, past_key, past_value, mask, cos, sin, sinks, scale, softcap, style, 0
        )
    return out.transpose(1, 2).flatten(2), key, value


def _written(past: Tensor, new: Tensor, index: Tensor, begins: Tensor) -> Tensor:
    """The past with the new tokens where index says; zeros behind what each sequence has."""
    known = torch.arange(past.shape[2]) < begins
    past = torch.where(known[:, None, :, None], past, 0)
    room = torch.cat([past, torch.zeros_like(new)], 2)
    return room.scatter(2, index.expand(new.shape), new)
