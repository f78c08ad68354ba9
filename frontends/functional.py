"""Copies into a fresh tensor become the tensor that is copied."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
CASTS = (aten.to.dtype, aten.to.device)
MAYBE_VIEWS = (*CASTS, aten.to.dtype_layout, aten.contiguous.default, aten.reshape.default,
               aten.flatten.using_ints)  # fmt: skip


def without_copies(graph: fx.Graph) -> None:
    """y = x.clone(); y.copy_(z); f(y) -> f(z), and y = x.clone(); f(y) -> f(x) after that.

    Only where no view of y outlives the copy, z is not changed in place itself and y and z have
    the same type and shape. What is left of in-place operators stays as it is.
    """
    for node in list(graph.nodes):
        if node.target in CASTS and _same(node, node.args[0]) and "copy" not in node.kwargs:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        target, source = node.args[0], node.args[1]
        if target.target is not aten.clone.default or not _same(target, source):
            continue
        views = _aliases(target) - {target, node}
        late = [u for view in views for u in view.users if order[u] > order[node]]
        if late or any(_mutates(user) for user in source.users if user is not node):
            continue
        after = [user for user in target.users if order[user] > order[node]]
        for user in after:
            user.replace_input_with(target, source)
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=aten.clone.default):
        given = node.args[0].op == "placeholder"
        if given and not any(_mutates(user) for alias in _aliases(node) for user in alias.users):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _same(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return (
        x.dtype == y.dtype
        and x.device == y.device
        and x.dim() == y.dim()
        and bool(x.shape == y.shape)
    )


def _aliases(node: fx.Node) -> set[fx.Node]:
    """The node and what may share its memory."""
    found, stack = set(), [node]
    while stack:
        item = stack.pop()
        if item not in found:
            found.add(item)
            stack += [user for user in item.users if _views(user)]
    return found


def _views(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or node.target in MAYBE_VIEWS:
        return True
    return any(value.alias_info is not None for value in schema.returns)


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
