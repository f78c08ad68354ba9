"""Each attention layer becomes one node that owns its cache and its rotation."""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from regraft.passes.base import Context, Pass, PassResult, is_call
from regraft.passes.regions import ancestors
from regraft.passes.rotation import RotationFinder
from regraft.program import Program
from regraft.program.program import source_of

aten = torch.ops.aten
regraft = torch.ops.regraft


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """attention(R q, [past_k; R k], [past_v; v]) -> cached_attention(q, k, v, past, cos, sin)

    Exact. Layers that are that already count. R is the rotary embedding; where none is
    recognised, q and k stay as they are and the result says why. The first layer that reads a
    cache owns it; later readers of the same keys and values stay attention over what the owner
    returns.
    """

    def apply(self, program: Program, context: Context) -> PassResult:
        done = regraft.cached_attention.default
        matches = len(program.graph.find_nodes(op="call_function", target=done))
        skipped = []
        finder = RotationFinder(program)
        for node in program.graph.find_nodes(op="call_function", target=regraft.attention.default):
            (key, tiles), (value, value_tiles) = map(_untiled, node.args[1:3])
            if _owner(key) is not None and _owner(key) is _owner(value):
                matches += 1
                continue
            reason = _why_not(node, key, value)
            if tiles != value_tiles:
                reason = "its keys and values repeat differently"
            if reason:
                skipped.append((source_of(node), reason))
                continue
            if tiles > 1:
                node = _without_tiles(program.graph, node, tiles)
            reason = _raise(program.graph, node, finder)
            if reason:
                skipped.append((f"{source_of(node)} rotation", reason))
            matches += 1
        if matches:
            _sort(program.graph)
        return PassResult(matches, tuple(skipped))


def _owner(node: Any) -> fx.Node | None:
    """The cached_attention whose present keys or values this is."""
    owner = node.args[0] if is_call(node, getitem) else None
    return owner if is_call(owner, regraft.cached_attention.default) else None


def _why_not(node: fx.Node, key: fx.Node, value: fx.Node) -> str:
    for kind, update in (("keys", key), ("values", value)):
        if not is_call(update, regraft.kv_update.default):
            return f"its {kind} do not come from its own cache"
    q, mask = node.args[0], node.args[3]
    others = {source for argument in (q, mask) if argument for source in ancestors(argument)}
    if key in others or key in (q, mask):
        return "its mask or its queries read the cached keys"
    return ""


def _untiled(node: Any) -> tuple[fx.Node, int]:
    """The cached heads, and how often they are tiled to one a query head."""
    if is_call(node, aten.repeat.default) and is_call(node.args[0], regraft.kv_update.default):
        batch, tiles, *rest = node.args[1]
        if [batch, *rest] == [1, 1, 1] and isinstance(tiles, int):
            return node.args[0], tiles
    return node, 1


def _swap_head_groups(graph: fx.Graph, node: fx.Node, groups: int) -> fx.Node:
    """Head g * n + i of groups * n heads [batch, heads, length, size] to head i * groups + g."""
    value = node.meta["val"]
    for target, args in (
        (aten.unflatten.int, (1, [groups, int(value.shape[1]) // groups])),
        (aten.transpose.int, (1, 2)),
        (aten.flatten.using_ints, (1, 2)),
    ):
        node = graph.call_function(target, (node, *args))
    node.meta["val"] = value
    return node


def _without_tiles(graph: fx.Graph, node: Any, tiles: int) -> fx.Node:
    """The same attention over the cached heads, its query heads grouped by them."""
    q, key, value, *rest = node.args
    cached = int(key.args[0].meta["val"].shape[1])
    with graph.inserting_before(node):
        q = _swap_head_groups(graph, q, tiles)
        inner = graph.call_function(node.target, (q, key.args[0], value.args[0], *rest))
        inner.meta = dict(node.meta)
        node.replace_all_uses_with(_swap_head_groups(graph, inner, cached))
    graph.erase_node(node)
    for tiled in {key, value}:
        if not tiled.users:
            graph.erase_node(tiled)
    return inner


def _raise(graph: fx.Graph, node: fx.Node, finder: RotationFinder) -> str:
    """Replace one attention and its updates; why no rotation was recognised."""
    q, key, value, mask, sinks, scale, softcap = node.args
    k, v = key.args[1], value.args[1]
    rotation, reason = finder.find(q, k)
    cos, sin, style, offset = None, None, "half", 0
    with graph.inserting_before(node):
        if rotation is not None:
            q, k = finder.unrotated(rotation)
            cos, sin, style, offset = finder.tables(rotation)
        raised = graph.call_function(
            regraft.cached_attention.default,
            (q, k, v, key.args[0], value.args[0], mask, cos, sin, sinks, scale, softcap, style,
             offset),
        )  # fmt: skip
        raised.meta = {**node.meta}
        raised.meta["val"] = (node.meta["val"], key.meta["val"], value.meta["val"])
        before = ancestors(raised)
        for index, old in enumerate((node, key, value)):
            item = graph.call_function(getitem, (raised, index))
            item.meta = dict(old.meta)
            old.replace_all_uses_with(item, lambda user: user not in before and user is not raised)
    return reason


def _sort(graph: fx.Graph) -> None:
    """Move nodes that come before their inputs behind them; keep all other order."""
    placed: set[fx.Node] = set()
    waiting: list[fx.Node] = []
    last = None
    for node in list(graph.nodes):
        waiting.append(node)
        moved = True
        while moved:
            moved = False
            for candidate in waiting:
                if all(source in placed for source in candidate.all_input_nodes):
                    if last is not None and last.next is not candidate:
                        last.append(candidate)
                    last = candidate
                    placed.add(candidate)
                    waiting.remove(candidate)
                    moved = True
                    break
