"""Parts of a graph: what lies between nodes, and what it computes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from regraft.program import Program


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes that this one depends on."""
    found: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            stack.extend(current.all_input_nodes)
    return found


def between(graph: fx.Graph, starts: Collection[Any], ends: Collection[Any]) -> list[fx.Node]:
    """The nodes after starts on paths from them to the ends, in order."""
    reached, inside = set(starts), []
    for node in graph.nodes:
        if node not in reached and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            inside.append(node)
    needed, kept = set(ends), []
    for node in reversed(inside):
        if node in needed:
            kept.append(node)
            needed.update(node.all_input_nodes)
    return kept[::-1]


def evaluate(program: Program, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a node; values holds the known ones and keeps the new ones."""
    if node not in values:
        if node.op == "get_attr":
            values[node] = getattr(program.graph_module, str(node.target))
        else:
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda source: evaluate(program, source, values)
            )
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node at the graph's insertion point that knows the shape of its result."""
    node = graph.call_function(target, args, kwargs)
    shown_args, shown_kwargs = fx.map_arg((args, kwargs), lambda source: source.meta["val"])
    node.meta["val"] = target(*shown_args, **shown_kwargs)
    return node
