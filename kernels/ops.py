"""The ``regraft::`` operators that graphs hold, with their reference bodies and shapes."""

from collections.abc import Callable
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from regraft.kernels.attention.reference import attention
from regraft.kernels.linear import packed as packed_linear
from regraft.kernels.rotary.reference import rotate

_library = torch.library.Library("regraft", "DEF")
modules: WeakValueDictionary[int, Callable[..., Tensor]] = WeakValueDictionary()
"""What ``regraft::module`` calls, by number, while something else keeps it alive."""
bodies: dict[torch._ops.OpOverload, Callable] = {}
"""Each operator's reference body, which autograd can follow; the operators themselves have no
gradients."""


def _define(schema: str, body, fake, call=None) -> None:
    """An operator; ``call`` is what it runs, where that is another than its reference body."""
    _library.define(schema)
    name = schema.split("(")[0]
    _library.impl(name, call or body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"regraft::{name}", fake, lib=_library)
    bodies[getattr(torch.ops.regraft, name).default] = body


def _update_fake(past: Tensor, new: Tensor) -> Tensor:
    batch, heads, length, size = new.shape
    return new.new_empty(batch, heads, past.shape[2] + length, size)


def _attention(q, k, v, mask, sinks, scale, softcap, causal=True):
    return attention(q, k, v, mask, scale, softcap, sinks, causal)


def _attention_fake(q, k, v, mask, sinks, scale, softcap, causal=True):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def causal_mask(padding, queries, keys, offset, window, batch):
    """Bool [batch, 1, queries, keys]: key t is seen by query s when t <= s + offset, within
    the window (0: unlimited), and where padding [batch, keys] is nonzero."""
    device = padding.device if padding is not None else None
    query = torch.arange(queries, device=device)[:, None] + offset
    key = torch.arange(keys, device=device)[None]
    seen = key <= query
    if window:
        seen = seen & (key > query - window)
    seen = seen[None, None]
    if padding is not None:
        seen = seen & padding[:, None, None, :keys].bool()
    return seen.expand(batch, 1, queries, keys).contiguous()


def _mask_fake(padding, queries, keys, offset, window, batch):
    device = padding.device if padding is not None else "cpu"
    return torch.empty(batch, 1, queries, keys, dtype=torch.bool, device=device)


def _cached(q, k, v, past_key, past_value, mask, cos, sin, sinks, scale, softcap, style, offset):
    if cos is not None:
        q = rotate(q, cos, sin, style == "interleaved", offset)
        k = rotate(k, cos, sin, style == "interleaved", offset)
    key, value = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    return attention(q, key, value, mask, scale, softcap, sinks), key, value


def _cached_fake(q, k, v, past_key, past_value, *_):
    return (
        q.new_empty(*q.shape[:-1], v.shape[-1]),
        _update_fake(past_key, k),
        _update_fake(past_value, v),
    )


_define(
    "kv_update(Tensor past, Tensor new) -> Tensor",
    lambda past, new: torch.cat([past, new], 2),
    _update_fake,
)
_define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, float scale, "
    "float softcap, *, bool causal=True) -> Tensor",
    _attention,
    _attention_fake,
)
_define(
    "causal_mask(Tensor? padding, SymInt queries, SymInt keys, SymInt offset, int window, "
    "SymInt batch) -> Tensor",
    causal_mask,
    _mask_fake,
)
_define(
    "module(Tensor[] inputs, int number) -> Tensor",
    lambda inputs, number: modules[number](*inputs),
    lambda inputs, number: torch.empty_like(inputs[0]),
)
_define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor past_key, Tensor past_value, "
    "Tensor? mask, Tensor? cos, Tensor? sin, Tensor? sinks, float scale, float softcap, "
    "str style, int offset) -> (Tensor, Tensor, Tensor)",
    _cached,
    _cached_fake,
)
for _name in ("packed_linear", "packed_direct"):  # the latter from C++ once one of its shape ran
    _define(
        f"{_name}(Tensor x, Tensor packed, Tensor? bias, str format, int rows) -> Tensor",
        packed_linear.reference,
        lambda x, packed, bias, format, rows: x.new_empty(*x.shape[:-1], rows),
        packed_linear.linear,
    )
_define(
    "packed_embedding(Tensor ids, Tensor packed, str format, int rows, int columns) -> Tensor",
    packed_linear.embedding,
    lambda ids, packed, format, rows, columns: ids.new_empty(
        *ids.shape, columns, dtype=torch.float32
    ),
)
