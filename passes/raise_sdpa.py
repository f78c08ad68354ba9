"""torch's scaled dot product attention to the one attention operator that passes rewrite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.passes.base import Context, Pass, PassResult
from regraft.program import Program
from regraft.program.program import source_of

aten = torch.ops.aten
regraft = torch.ops.regraft


@dataclass(frozen=True)
class RaiseSdpa(Pass):
    """scaled_dot_product_attention(q, k, v, mask) -> attention(q, k, v, mask, scale)     exact

    A causal call with as many queries as keys stays causal; with other lengths, torch aligns the
    diagonal to the first key, and the mask is made explicit.
    """

    def apply(self, program: Program, context: Context) -> PassResult:
        matches, skipped = 0, []
        target = aten.scaled_dot_product_attention.default
        for node in program.graph.find_nodes(op="call_function", target=target):
            reason = _reason(node)
            if reason:
                skipped.append((source_of(node), reason))
            else:
                _raise(program.graph, node)
                matches += 1
        found = (
            matches
            or skipped
            or program.graph.find_nodes(op="call_function", target=regraft.attention.default)
        )
        for node in (
            () if found else program.graph.find_nodes(op="call_function", target=aten.softmax.int)
        ):
            skipped.append((source_of(node), "attention is spelled out operator by operator"))
        return PassResult(matches, tuple(skipped))


def _reason(node: fx.Node) -> str:
    q, k, v = (n.meta["val"] for n in node.args[:3])
    if _argument(node, 4, "dropout_p", 0.0):
        return "it drops attention at random"
    if q.dim() != 4:
        return f"its queries have {q.dim()} dimensions, not 4"
    if not _same(k.shape[0], q.shape[0]) or not _same(v.shape[0], q.shape[0]):
        return "its keys are shared by the batch"
    if k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1]:
        return "its heads are no multiple of its key heads"
    return ""


def _raise(graph: fx.Graph, node: fx.Node) -> None:
    arguments: tuple[Any, ...] = node.args
    q, k, v = arguments[:3]
    mask = _argument(node, 3, "attn_mask", None)
    causal = bool(_argument(node, 5, "is_causal", False))
    scale = _argument(node, 6, "scale", None)
    query, key = q.meta["val"], k.meta["val"]
    if scale is None:
        scale = float(query.shape[-1]) ** -0.5
    with graph.inserting_before(node):
        if causal and not _same(query.shape[2], key.shape[2]):
            mask, causal = _first_key_mask(graph, q, k), False
        out = graph.call_function(
            regraft.attention.default, (q, k, v, mask, None, scale, 0.0), {"causal": causal}
        )
    out.meta = dict(node.meta)
    node.replace_all_uses_with(out)
    graph.erase_node(node)


def _first_key_mask(graph: fx.Graph, q: fx.Node, k: fx.Node) -> fx.Node:
    """Bool [batch, 1, queries, keys]: query s sees keys 0..s."""
    query, key = q.meta["val"], k.meta["val"]

    def call(target: Any, arguments: tuple, value: Any) -> fx.Node:
        node = graph.call_function(target, arguments)
        node.meta["val"] = value
        return node

    batch = call(aten.sym_size.int, (q, 0), query.shape[0])
    rows = call(aten.sym_size.int, (q, 2), query.shape[2])
    length = call(aten.sym_size.int, (k, 2), key.shape[2])
    keys = query.new_empty(query.shape[0], key.shape[2])
    seen = call(aten.new_ones.default, (q, [batch, length]), keys)
    shape = (query.shape[0], 1, query.shape[2], key.shape[2])
    value = query.new_empty(shape, dtype=torch.bool)
    return call(regraft.causal_mask.default, (seen, rows, length, 0, 0, batch), value)


def _same(a: Any, b: Any) -> bool:
    """Equal sizes; symbolic ones are compared as they are written, without a guard."""
    return str(a) == str(b)


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)
