"""Attention in standard ONNX operators: the bodies of the functions that exports call.

b is a ``frontends.export.builder.Builder``.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from regraft.kernels.rotary.onnx import rotate


def causal_mask(
    b: Any, padding: Any, queries: Any, keys: Any, offset: Any, batch: Any, window: int
) -> Any:
    """Bool [batch, 1, queries, keys], see ``ops.causal_mask``; the sizes are int64 [1]."""
    query = b.unsqueeze(b.op("Add", b.range(queries), offset), 1)
    key = b.unsqueeze(b.range(keys), 0)
    seen = b.op("LessOrEqual", key, query, dtype=torch.bool)
    if window:
        first = b.op("Sub", query, b.constant(window))
        seen = b.op("And", seen, b.op("Greater", key, first, dtype=torch.bool))
    if padding is None:
        one = b.constant([1])
        return b.op("Expand", seen, b.op("Concat", batch, one, queries, keys, axis=0))
    kept = b.slice(b.to(padding, torch.bool), 0, keys, 1)
    return b.op("And", seen, b.unsqueeze(kept, 1, 2))


def attention(
    b: Any, q: Any, k: Any, v: Any, mask: Any, sinks: Any, scale: float, softcap: float,
    causal: bool,
) -> Any:  # fmt: skip
    """``reference.attention`` of q [B, Hq, S, D] to k [B, H, T, D], v [B, H, T, Dv].

    The heads of a group are rows of one product, so that keys are not repeated.
    """
    heads, shared = int(q.shape[1]), int(k.shape[1])
    total = b.size(k, 2)
    rows = b.op("Mul", q, b.op("CastLike", b.constant(scale, torch.float32), q))
    if heads != shared:
        rows = b.op("Reshape", rows, b.constant([0, shared, -1, int(q.shape[3])]))
    scores = b.op("MatMul", rows, b.transpose(k, 0, 1, 3, 2))
    if heads != shared:
        scores = b.op("Reshape", scores, b.op("Concat", b.constant([0, heads, -1]), total, axis=0))
    if softcap:
        cap = b.op("CastLike", b.constant(softcap, torch.float32), q)
        scores = b.op("Mul", b.op("Tanh", b.op("Div", scores, cap)), cap)
    if mask is None and causal:
        one = b.constant([1])
        length = b.size(q, 2)
        mask = causal_mask(b, None, length, total, b.op("Sub", total, length), one, 0)
    if mask is not None:
        scores = masked(b, scores, mask)
    weights = b.op("Softmax", scores, axis=-1) if sinks is None else _with_sinks(b, scores, sinks)
    if heads != shared:
        weights = b.op(
            "Reshape", weights, b.op("Concat", b.constant([0, shared, -1]), total, axis=0)
        )
    out = b.op("MatMul", weights, v)
    if heads != shared:
        out = b.op("Reshape", out, b.constant([0, heads, -1, int(v.shape[3])]))
    return out


def masked(b: Any, scores: Any, mask: Any) -> Any:
    """Scores with a boolean mask, or one that is added. None is -inf: where a row sees nothing,
    softmax would make that nan."""
    lowest = b.constant(-1e30 if scores.dtype == ir.DataType.FLOAT else -6e4, torch.float32)
    lowest = b.op("CastLike", lowest, scores)
    if mask.dtype == ir.DataType.BOOL:
        return b.op("Where", mask, scores, lowest)
    return b.op("Add", scores, b.op("Max", mask, lowest))


def _with_sinks(b: Any, scores: Any, sinks: Any) -> Any:
    column = b.op("Reshape", sinks, b.constant([1, -1, 1, 1])) if len(sinks.shape) == 1 else sinks
    sizes = b.op("Concat", b.op("Shape", scores, end=-1), b.constant([1]), axis=0)
    column = b.op("Expand", b.op("CastLike", column, scores), sizes)
    weights = b.op("Softmax", b.op("Concat", scores, column, axis=-1), axis=-1)
    return b.slice(weights, 0, -1, -1)


def cached_attention(
    b: Any, q: Any, k: Any, v: Any, past_key: Any, past_value: Any, mask: Any, cos: Any, sin: Any,
    sinks: Any, scale: float, softcap: float, interleaved: bool, offset: int,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Rotate q and k, append k and v to the past, attend: out, present key and value."""
    if cos is not None:
        q, k = (rotate(b, x, cos, sin, interleaved, offset) for x in (q, k))
    key, value = (
        b.op("Concat", past, new, axis=2) for past, new in ((past_key, k), (past_value, v))
    )
    key.shape, value.shape = past_key.shape, past_value.shape
    return attention(b, q, key, value, mask, sinks, scale, softcap, True), key, value


def group_query_attention(
    b: Any, q: Any, k: Any, v: Any, past_key: Any, past_value: Any, mask: Any, cos: Any, sin: Any,
    scale: float, softcap: float, interleaved: bool, offset: int,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """``cached_attention`` by onnxruntime's fused operator; mask bool [B, 1, S, T]."""
    if cos is not None:
        q, k = (rotate(b, x, cos, sin, interleaved, offset) for x in (q, k))
    heads, shared = int(q.shape[1]), int(k.shape[1])
    flat = [b.op("Reshape", b.transpose(x, 0, 2, 1, 3), b.constant([0, 0, -1])) for x in (q, k, v)]
    total = b.cast(b.op("Add", b.size(past_key, 2), b.size(k, 2)), torch.int32)
    last = b.op("Sub", total, b.constant([1], torch.int32))
    lengths = b.op("Expand", last, b.size(q, 0))
    bias = None
    if mask is not None:
        bias = b.op("Where", mask, b.to(0.0), b.to(-1e30 if b.dtype == torch.float32 else -6e4))
    out, key, value = b.op(
        *("GroupQueryAttention", *flat, past_key, past_value, lengths, b.squeeze(total, 0)),
        *(None, None, None, bias),
        outputs=3, domain="com.microsoft", num_heads=heads, kv_num_heads=shared, scale=float(scale),
        softcap=float(softcap),
    )  # fmt: skip
    out = b.op("Reshape", out, b.constant([0, 0, heads, -1]))
    return b.transpose(out, 0, 2, 1, 3), key, value
