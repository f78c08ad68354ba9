"""The ``regraft::`` operators as ONNX nodes: each operator's own ``onnx`` file says how."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from regraft.frontends.export import kvquant, packed  # noqa: F401  packed registers its own
from regraft.frontends.export.builder import Builder, lowers
from regraft.kernels.attention import onnx as attention


@lowers("regraft.causal_mask")
def causal_mask(
    b: Builder, padding: Any, queries: Any, keys: Any, offset: Any, window: int, batch: Any
) -> ir.Value:
    sizes = [b.vector(n) for n in (queries, keys, offset, batch)]
    return b.call("CausalMask", attention.causal_mask, padding, *sizes, window=window)


@lowers("regraft.attention")
def plain_attention(
    b: Builder, q: Any, k: Any, v: Any, mask: Any, sinks: Any, scale: float, softcap: float,
    *, causal: bool = True,
) -> ir.Value:  # fmt: skip
    settings = {"scale": scale, "softcap": softcap, "causal": causal}
    return b.call("Attention", attention.attention, q, k, v, mask, sinks, **settings)


@lowers("regraft.cached_attention")
def cached_attention(
    b: Builder, q: Any, k: Any, v: Any, past_key: Any, past_value: Any, mask: Any, cos: Any,
    sin: Any, sinks: Any, scale: float, softcap: float, style: str, offset: int,
) -> list[ir.Value]:  # fmt: skip
    keys = [name for name in b.given if name.endswith(".key")]
    name = next(name for name in keys if b.given[name] is past_key)
    state = b.cache.layers[keys.index(name)]
    if state.format != "dense":
        turn = (cos, sin, style == "interleaved", offset)
        return kvquant.attend(
            b, name.removesuffix(".key"), state, q, k, v, past_key, past_value, mask, turn, sinks,
            scale, softcap,
        )  # fmt: skip
    if b.contrib and sinks is None and (mask is None or mask.dtype == ir.DataType.BOOL):
        b.fused["GroupQueryAttention"] = b.fused.get("GroupQueryAttention", 0) + 1
        return list(
            attention.group_query_attention(
                b, q, k, v, past_key, past_value, mask, cos, sin, scale, softcap,
                style == "interleaved", offset,
            )
        )  # fmt: skip
    return b.call(
        *("CachedAttention", attention.cached_attention),
        *(q, k, v, past_key, past_value, mask, cos, sin, sinks),
        outputs=3, scale=scale, softcap=softcap, interleaved=style == "interleaved", offset=offset,
    )  # fmt: skip


@lowers("regraft.kv_update")
def kv_update(b: Builder, past: ir.Value, new: ir.Value) -> ir.Value:
    return b.op("Concat", past, new, axis=2)


@lowers("regraft.module")
def module(b: Builder, *_: Any) -> Any:
    raise NotImplementedError("it is Python code that depends on the values of tensors")
