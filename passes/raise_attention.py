"""Each attention layer becomes one node that owns its cache and its rotation."""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx

from regraft.passes.base import Context, Pass, PassResult, is_call
from regraft.passes.regions import ancestors
from regraft.passes.rotation import RotationFinder
from regraft.program import Program
from regraft.program.program import source_of

regraft = torch.ops.regraft


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """attention(R q, [past_k; R k], [past_v; v]) -> cached_attention(q, k, v, past, cos, sin)

    Exact. R is the rotary embedding; where none is recognised, q and k stay as they are and the
    result says why. The first layer that reads a cache owns it; later readers of the same keys
    and values stay attention over what the owner returns.
    """

    def apply(self, program: Program, context: Context) -> PassResult:
        matches, skipped = 0, []
        finder = RotationFinder(program)
        for node in program.graph.find_nodes(op="call_function", target=regraft.attention.default):
            key, value = node.args[1:3]
            if _owner(key) is not None and _owner(key) is _owner(value):
                matches += 1
                continue
            reason = _why_not(node)
            if reason:
                skipped.append((source_of(node), reason))
                continue
            reason = _raise(program.graph, node, finder)
            if reason:
                skipped.append((f"{source_of(node)} rotation", reason))
            matches += 1
        if matches:
            _sort(program.graph)
        return PassResult(matches, tuple(skipped))


def _owner(node: fx.Node) -> fx.Node | None:
    """The cached_attention whose present keys or values this is."""
    owner = node.args[0] if is_call(node, getitem) else None
    return owner if is_call(owner, regraft.cached_attention.default) else None


def _why_not(node: fx.Node) -> str:
    key, value = node.args[1:3]
    for kind, update in (("keys", key), ("values", value)):
        if not is_call(update, regraft.kv_update.default):
            return f"its {kind} do not come from its own cache"
    if any(user in ancestors(node) for user in key.users):
        return "its mask or its queries read the cached keys"
    return ""


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
