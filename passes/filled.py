"""Buffers that a model fills slice by slice become concatenations."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
EMPTY = (aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default)


def concatenate_filled(graph: fx.Graph) -> int:
    """e = empty(...); e[..., a:b] = x; e[..., b:c] = y  ->  cat(x, y); how many were replaced."""
    replaced = 0
    for node in [n for n in graph.nodes if n.target in EMPTY]:
        found = _pieces(node)
        if found is None:
            continue
        dim, pieces, copies = found
        with graph.inserting_after(copies[-1]):
            joined = graph.call_function(aten.cat.default, (pieces, dim))
        joined.meta = dict(node.meta)
        slices = [copy.args[0] for copy in copies]
        node.replace_all_uses_with(joined, lambda user, own=slices: user not in own)
        for dead in (*copies, *slices, node):
            graph.erase_node(dead)
        replaced += 1
    return replaced


def _pieces(buffer: fx.Node) -> tuple[int, list[Any], list[fx.Node]] | None:
    """Dimension, sources in order and copies in graph order, where slices tile the buffer."""
    order = {node: i for i, node in enumerate(buffer.graph.nodes)}
    rank = buffer.meta["val"].dim()
    written: list[Any] = []
    copies: list[Any] = []
    dims: set[int] = set()
    user: Any
    for user in buffer.users:
        copy = next(iter(user.users), None)
        if user.target != aten.slice.Tensor or copy is None or copy.target != aten.copy_.default:
            continue
        source: Any = copy.args[1]
        if len(user.users) > 1 or copy.users or copy.args[0] is not user or len(user.args) != 4:
            return None
        if tuple(source.meta["val"].shape) != tuple(user.meta["val"].shape):
            return None
        dims.add(user.args[1] % rank)
        written.append((user.args[2], user.args[3], source))
        copies.append(copy)
    if len(dims) != 1 or not all(isinstance(edge, int) for *edges, _ in written for edge in edges):
        return None
    copies.sort(key=order.__getitem__)
    slices = [copy.args[0] for copy in copies]
    if any(order[u] < order[copies[-1]] for u in buffer.users if u not in slices):
        return None
    dim, end = dims.pop(), 0
    written.sort(key=lambda item: item[0])
    for start, stop, _ in written:
        if start != end:
            return None
        end = stop
    if end not in (sys.maxsize, buffer.meta["val"].shape[dim]):
        return None
    return dim, [source for *_, source in written], copies
