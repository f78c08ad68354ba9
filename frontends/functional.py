"""In-place operators become operators that return a new tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
CASTS = (aten.to.dtype, aten.to.device)
VIEWS: dict[Any, Any] = {
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
}
MAYBE_VIEWS = (*CASTS, aten.to.dtype_layout, aten.contiguous.default, aten.reshape.default,
               aten.flatten.using_ints)  # fmt: skip


def functionalize(graph: fx.Graph) -> None:
    """y.copy_(z); f(y) -> f(z),  y[i] = z; f(y) -> f(select_scatter(y, z, i)),  y += z -> y + z

    Views of y that are read later are taken of the new tensor. Operators whose effect cannot be
    followed (through a view other than a slice or an index) stay as they are.
    """
    for node in list(graph.nodes):
        if node.target in CASTS and _like(node, node.args[0]) and "copy" not in node.kwargs:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        if _mutates(node):
            _replace(graph, node)
    for node in graph.find_nodes(op="call_function", target=aten.clone.default):
        aliases = _aliases(node)
        if node.args[0].op == "placeholder" and not any(
            _mutates(user) for alias in aliases for user in alias.users
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    chain, target = [], node.args[0]
    while isinstance(target, fx.Node) and target.target in VIEWS:
        chain.append(target)
        target = target.args[0]
    order = {n: i for i, n in enumerate(graph.nodes)}
    if not isinstance(target, fx.Node) or target.op != "call_function" or _views(target):
        return
    written: Any = node.args[0]
    aliases = _aliases(target) - {node}
    late = {a: [u for u in a.users if order[u] > order[node]] for a in aliases}
    stale = [a for a in sorted(aliases, key=order.__getitem__) if order[a] < order[node]]
    if any(late[a] and a is not target and a.target not in VIEWS for a in stale):
        return
    with graph.inserting_before(node):
        value = _value(graph, node)
        if value is None:
            return
        for view in chain:
            value = _call(graph, VIEWS[view.target], (view.args[0], value, *view.args[1:]),
                          view.args[0].meta)  # fmt: skip
    fresh: dict[fx.Node, fx.Node] = {target: value}
    with graph.inserting_before(node):
        for alias in stale:
            viewed: Any = alias.args[0]
            if alias is not target and viewed in fresh:
                fresh[alias] = graph.node_copy(alias, lambda n: fresh.get(n, n))
    node.replace_all_uses_with(fresh.get(written, value))
    for alias in stale:
        for user in late[alias]:
            if alias in fresh:
                user.replace_input_with(alias, fresh[alias])
    graph.erase_node(node)


def _value(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """What the in-place operator leaves in its first argument."""
    written: Any = node.args[0]
    if node.target is aten.copy_.default:
        source: Any = node.args[1]
        if not _like(source, written, shape=False):
            dtype = written.meta["val"].dtype
            source = _call(graph, aten.to.dtype, (source, dtype), written.meta)
        if tuple(source.meta["val"].shape) != tuple(written.meta["val"].shape):
            source = _call(graph, aten.expand_as.default, (source, written), written.meta)
        return source
    packet = getattr(aten, str(node.target).split(".")[1].removesuffix("_"), None)
    overload = getattr(packet, node.target._overloadname, None)
    if overload is None or overload._schema.is_mutable:
        return None
    return _call(graph, overload, node.args, written.meta, node.kwargs)


def _call(graph: fx.Graph, target: Any, args: Any, meta: Any, kwargs: Any = None) -> fx.Node:
    made = graph.call_function(target, tuple(args), dict(kwargs or {}))
    made.meta = dict(meta)
    return made


def _like(a: fx.Node, b: fx.Node, shape: bool = True) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    same = x.dtype == y.dtype and x.device == y.device
    return same and (not shape or tuple(x.shape) == tuple(y.shape))


def _aliases(node: fx.Node) -> set[fx.Node]:
    """The node and what may share its memory."""
    found, stack = set(), [node]
    while stack:
        item = stack.pop()
        if item not in found:
            found.add(item)
            stack += [user for user in item.users if _views(user) and user.args[0] is item]
    return found


def _views(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if node.target in MAYBE_VIEWS:
        return True
    return schema is not None and any(value.alias_info is not None for value in schema.returns)


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
