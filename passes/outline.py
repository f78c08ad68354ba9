"""Identical layers become one region that is called once a layer with that layer's weights."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx
from torch.fx.passes.tools_common import legalize_graph

from regraft.passes.base import Context, Pass, PassResult
from regraft.program import Program
from regraft.program.program import source_of

aten = torch.ops.aten
BOUNDARIES = (
    torch.ops.regraft.cached_attention.default,
    torch.ops.regraft.attention.default,
    torch.ops.regraft.kv_update.default,
    torch.ops.regraft.module.default,
    aten.scaled_dot_product_attention.default,
)


@dataclass(frozen=True)
class OutlineLayers(Pass):
    """attend, f(., W1), attend, f(., W2), ... -> attend, region(., W1), attend, region(., W2)

    Exact. A region is all that lies between one attention and the next; weights and activations
    are its inputs. Regions that occur ``least`` times or more become one submodule, which is
    compiled once.
    """

    least: int = 2

    def apply(self, program: Program, context: Context) -> PassResult:
        if changing := [node for node in program.graph.nodes if _mutates(node)]:
            where = source_of(changing[0])
            return PassResult(0, ((where, f"{changing[0].name} changes a tensor in place"),))
        groups: dict[tuple, list[_Region]] = defaultdict(list)
        for nodes in _levels(program.graph):
            if region := _Region.of(nodes, program.graph_module):
                groups[region.key].append(region)
        repeated = [group for group in groups.values() if len(group) >= self.least]
        replaced: dict[fx.Node, fx.Node] = {}
        modules = [group[0].module() for group in repeated]
        for index, (group, module) in enumerate(zip(repeated, modules, strict=True)):
            name = f"region_{index}"
            program.graph_module.add_submodule(name, module)
            for region in group:
                region.call(program.graph, name, replaced)
        if repeated:
            legalize_graph(program.graph_module)
        return PassResult(sum(map(len, repeated)))


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _levels(graph: fx.Graph) -> list[list[fx.Node]]:
    """Calls grouped by how many attention operators lie on the longest path to them."""
    depth: dict[fx.Node, int] = {}
    levels: dict[int, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        depth[node] = max((depth[a] for a in node.all_input_nodes), default=0)
        if node.op != "call_function" or node.target in BOUNDARIES:
            depth[node] += node.target in BOUNDARIES
        elif not (node.target is getitem and node.args[0].target in BOUNDARIES):
            levels[depth[node]].append(node)
    return [nodes for level, nodes in sorted(levels.items()) if level]


@dataclass
class _Region:
    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    sizes: dict[fx.Node, tuple[int, int]]
    """Symbolic sizes from outside: the (input, dimension) that they can be read from."""
    key: tuple

    @classmethod
    def of(cls, nodes: list[fx.Node], module: fx.GraphModule) -> _Region | None:
        """None when a size that the nodes use cannot be read from their tensors."""
        inside = set(nodes)
        outside = list(
            dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside)
        )
        scalars = [a for a in outside if isinstance(a.meta.get("val"), torch.SymInt)]
        inputs = [a for a in outside if a not in scalars]
        if any(not torch.is_tensor(a.meta.get("val")) for a in inputs):
            return None
        sizes = {}
        for scalar in scalars:
            place = _find_size(scalar.meta["val"], inputs)
            if place is None:
                return None
            sizes[scalar] = place
        outputs = [n for n in nodes if any(user not in inside for user in n.users)]
        return cls(nodes, inputs, outputs, sizes, _key(nodes, inputs, outputs, sizes))

    def module(self) -> fx.GraphModule:
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        for i, node in enumerate(self.inputs):
            made[node] = graph.placeholder(f"{'w' if node.op == 'get_attr' else 'x'}{i}")
            made[node].meta = {"val": node.meta["val"]}
        for scalar, (index, dim) in self.sizes.items():
            source = made[self.inputs[index]]
            made[scalar] = graph.call_function(aten.sym_size.int, (source, dim))
        for node in self.nodes:
            made[node] = graph.node_copy(node, made.__getitem__)
        graph.output(tuple(made[node] for node in self.outputs))
        return fx.GraphModule({}, graph)

    def call(self, graph: fx.Graph, name: str, replaced: dict[fx.Node, fx.Node]) -> None:
        with graph.inserting_after(self.nodes[-1]):
            call = graph.call_module(name, tuple(replaced.get(n, n) for n in self.inputs))
        call.meta = {k: v for k, v in self.nodes[0].meta.items() if k != "val"}
        for index, node in reversed(list(enumerate(self.outputs))):
            with graph.inserting_after(call):
                item = graph.call_function(getitem, (call, index))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item)
            replaced[node] = item
        for node in reversed(self.nodes):
            graph.erase_node(node)


def _find_size(size: torch.SymInt, inputs: list[fx.Node]) -> tuple[int, int] | None:
    for index, node in enumerate(inputs):
        for dim, length in enumerate(node.meta["val"].shape):
            if isinstance(length, torch.SymInt) and length.node.expr == size.node.expr:
                return index, dim
    return None


def _key(nodes, inputs, outputs, sizes) -> tuple:
    """Equal for regions that compute the same function of their inputs."""
    names = {node: f"%{i}" for i, node in enumerate(nodes)}
    names |= {node: f"@{i}" for i, node in enumerate(inputs)}
    names |= {node: f"size{place}" for node, place in sizes.items()}

    def text(argument) -> str:
        return repr(fx.map_arg(argument, lambda node: _Name(names[node])))

    calls = (f"{n.target}{text(n.args)}{text(n.kwargs)}" for n in nodes)
    tensors = (f"{n.op == 'get_attr'}{n.meta['val'].dtype}{_shape(n)}" for n in inputs)
    return (*tensors, *calls, *(names[n] for n in outputs))


def _shape(node: fx.Node) -> list[str]:
    return [str(length) for length in node.meta["val"].shape]


class _Name(str):
    __repr__ = str.__str__
