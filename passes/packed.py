"""What passes share that put packed weights in the place of float ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from regraft.program import Program, RegraftError
from regraft.program.program import source_of

aten, regraft = torch.ops.aten, torch.ops.regraft
PACKED = (regraft.packed_linear.default, regraft.packed_embedding.default)


def linears(program: Program) -> list[fx.Node]:
    """The linear layers whose weight is a float matrix that the program owns."""
    found = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    return [n for n in found if n.args[1].op == "get_attr" and n.args[1].meta["val"].dim() == 2]


def refuse_packed(program: Program, name: str) -> None:
    """RegraftError where a pass of this name meets packed weights and needs floats."""
    for target in PACKED:
        for node in program.graph.find_nodes(op="call_function", target=target):
            raise RegraftError(
                f"{name} needs float weights, and {source_of(node)} is packed: put {name} before "
                "the pass that packs, or compile the float model"
            )


def put(program: Program, name: str, packed: Tensor, before: fx.Node) -> fx.Node:
    """A node that reads the packed weights, kept under this name."""
    module = program.graph_module
    if not hasattr(module, name):
        module.register_buffer(name, packed)
    with program.graph.inserting_before(before):
        node = program.graph.get_attr(name)
    node.meta["val"] = packed
    return node


def replace_linear(program: Program, node: fx.Node, weight: fx.Node, format: str) -> fx.Node:
    """linear(x, W, bias) by packed weights."""
    rows = int(node.meta["val"].shape[-1])
    bias = node.args[2] if len(node.args) > 2 else None
    arguments = (node.args[0], weight, bias, format, rows)
    return _replace(program, node, regraft.packed_linear.default, arguments)


def replace_embedding(program: Program, node: fx.Node, weight: fx.Node, format: str) -> fx.Node:
    """embedding(W, ids) by packed weights."""
    rows, columns = map(int, node.args[0].meta["val"].shape)
    arguments = (node.args[1], weight, format, rows, columns)
    return _replace(program, node, regraft.packed_embedding.default, arguments)


def _replace(program: Program, node: fx.Node, target: Any, arguments: tuple) -> fx.Node:
    with program.graph.inserting_before(node):
        made = program.graph.call_function(target, arguments)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    program.graph.erase_node(node)
    return made
