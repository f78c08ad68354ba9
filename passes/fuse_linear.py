"""Linear layers that read the same input become one, so that weights stream once."""

from collections import defaultdict
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from regraft.kernels.linear.formats import HALVES, ROWS
from regraft.passes.base import Context, Pass, PassResult
from regraft.program import Program
from regraft.program.program import source_of

aten = torch.ops.aten
packed_linear = torch.ops.regraft.packed_linear.default


@dataclass(frozen=True)
class FuseLinear(Pass):
    """x W1', x W2', ... -> split(x [W1; W2; ...]')        exact up to the order of sums

    Query, key and value projections, and gate and up projections, in any model.
    """

    def apply(self, program: Program, context: Context) -> PassResult:
        groups: dict[tuple, list[fx.Node]] = defaultdict(list)
        for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
            if node.args[1].op == "get_attr":
                groups[node.args[0], len(node.args) > 2 and node.args[2] is not None].append(node)
        matches, skipped = _fuse_packed(program), []
        for nodes in groups.values():
            if len(nodes) < 2:
                continue
            constants = [argument for node in nodes for argument in node.args[1:] if argument]
            if any(c.op != "get_attr" or len(c.users) > 1 for c in constants):
                skipped.append((source_of(nodes[0]), "a weight is used elsewhere"))
                continue
            program.metadata.setdefault("stacked", {}).update(_fuse(program.graph_module, nodes))
            matches += 1
        return PassResult(matches, tuple(skipped))


def _fuse(module: fx.GraphModule, nodes: list[fx.Node]) -> dict[str, list[str]]:
    """Replace the nodes by one; the new tensors and what each is stacked from."""
    graph, first = module.graph, nodes[0]
    position = {node: i for i, node in enumerate(graph.nodes)}
    first = min(nodes, key=position.__getitem__)
    fused, stacked_from = [], {}
    with graph.inserting_before(first):
        for index in range(1, len(first.args)):
            names = [str(node.args[index].target) for node in nodes if node.args[index]]
            if not names:
                continue
            parts = [getattr(module, name) for name in names]
            name = f"{first.args[index].target}_fused"
            stacked_from[name] = names
            with torch.no_grad():
                stacked = torch.cat(parts)
            module.register_parameter(name, torch.nn.Parameter(stacked, requires_grad=False))
            fused.append(graph.get_attr(name))
            fused[-1].meta = {**first.args[index].meta, "val": stacked}
        linear = graph.call_function(aten.linear.default, (first.args[0], *fused))
        _split_among(nodes, linear)
    return stacked_from


def _split_among(nodes: list[fx.Node], linear: fx.Node) -> None:
    """Give the channels of ``linear`` to the users of the nodes that it stands for."""
    graph = linear.graph
    sizes = [int(node.meta["val"].shape[-1]) for node in nodes]
    split = graph.call_function(aten.split_with_sizes.default, (linear, sizes, -1))
    linear.meta = {**nodes[0].meta}
    linear.meta["val"] = torch.cat([node.meta["val"] for node in nodes], -1)
    for i, node in enumerate(nodes):
        piece = graph.call_function(getitem, (split, i))
        piece.meta = dict(node.meta)
        node.replace_all_uses_with(piece)
    for node in nodes:
        graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target in (aten.view.default,) and _is_item(node.args[0]):
            node.target = aten.reshape.default


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The tensors as one, without a copy where they follow each other in memory."""
    ends = [part.data_ptr() + part.nbytes for part in parts]
    same = all(part.untyped_storage()._cdata == parts[0].untyped_storage()._cdata for part in parts)
    if not same or ends[:-1] != [part.data_ptr() for part in parts[1:]]:
        return torch.cat(parts)
    rows = sum(len(part) for part in parts)
    return parts[0].as_strided((rows, parts[0].shape[1]), parts[0].stride())


def _fuse_packed(program: Program) -> int:
    """The same of layers whose weights are packed in one format; how many groups there were."""
    module, graph, found = program.graph_module, program.graph, 0
    groups: dict[tuple, list[fx.Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=packed_linear):
        x, weight, bias, format, rows = node.args
        if bias is None and rows % ROWS == 0 and len(weight.users) == 1 and format not in HALVES:
            groups[x, format].append(node)
    for (x, format), nodes in groups.items():
        if len(nodes) < 2:
            continue
        position = {node: i for i, node in enumerate(graph.nodes)}
        weights: list[Any] = [node.args[1] for node in nodes]
        packed = _joined([getattr(module, weight.target) for weight in weights])
        first = min(nodes, key=position.__getitem__)
        with graph.inserting_before(first):
            name = f"{weights[0].target}_fused"
            module.register_buffer(name, packed)
            weight = graph.get_attr(name)
            weight.meta["val"] = packed
            counts: list[Any] = [node.args[4] for node in nodes]
            linear = graph.call_function(packed_linear, (x, weight, None, format, sum(counts)))
            _split_among(nodes, linear)
        sources = program.metadata.get("packed", {})
        parts = [sources.pop(weight.target, None) for weight in weights]
        if all(parts):
            sources[name] = [source for part in parts for source in part]
        for weight in weights:
            graph.erase_node(weight)
            weight.meta.clear()  # erased nodes live until garbage is collected
            delattr(module, weight.target)
        found += 1
    return found


def _is_item(node) -> bool:
    return isinstance(node, fx.Node) and node.target is getitem


def split_fused(program: Program) -> int:
    """split(x [W1; W2; ...]') -> x W1', x W2', ...: the inverse of FuseLinear; how many were split.

    Also where the model itself stacks its projections.
    """
    found = 0
    splits = (aten.split_with_sizes.default, aten.split.Tensor)
    for split in [node for node in program.graph.nodes if node.target in splits]:
        linear, sizes = split.args[0], split.args[1]
        if (
            linear.target != aten.linear.default
            or len(linear.users) > 1
            or any(a.op != "get_attr" or len(a.users) > 1 for a in linear.args[1:] if a)
            or (len(split.args) > 2 and split.args[2] not in (-1, linear.meta["val"].dim() - 1))
        ):
            continue
        if isinstance(sizes, int):
            whole = linear.meta["val"].shape[-1]
            sizes = [min(sizes, whole - start) for start in range(0, whole, sizes)]
        _split(program, split, linear, sizes)
        found += 1
    return found


def _split(program: Program, split: fx.Node, linear: fx.Node, sizes: list[int]) -> None:
    module, graph = program.graph_module, program.graph
    known = program.metadata.get("stacked", {})
    pieces: list[list[fx.Node]] = [[] for _ in sizes]
    with graph.inserting_before(linear):
        for argument in [a for a in linear.args[1:] if a]:
            name = str(argument.target)
            names = known.pop(name, [f"{name}_{i}" for i in range(len(sizes))])
            for piece, part, tensor in zip(
                pieces, names, getattr(module, name).split(sizes), strict=True
            ):
                weight = torch.nn.Parameter(tensor.clone(), requires_grad=False)
                setattr(module, part, getattr(module, part, weight))
                piece.append(graph.get_attr(part))
                piece[-1].meta = {**argument.meta, "val": getattr(module, part)}
        item: Any
        for item in list(split.users):
            new = graph.call_function(
                aten.linear.default, (linear.args[0], *pieces[int(item.args[1])])
            )
            new.meta = dict(item.meta)
            item.replace_all_uses_with(new)
            graph.erase_node(item)
    constants: list[Any] = [a for a in linear.args[1:] if a]
    for dead in (split, linear, *constants):
        graph.erase_node(dead)
