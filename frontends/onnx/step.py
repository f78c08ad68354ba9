"""One call of an ONNX language model as a step to trace, and what is raised in its graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from regraft.frontends.onnx.decoding import Decoding, decoding
from regraft.frontends.onnx.module import OnnxModule
from regraft.program import Program, TensorSpec

PAST, PRESENT = "past_key_values.", "present."


class Step(nn.Module):
    """One call of the model: ids, mask, positions, logits to keep, past keys and values."""

    def __init__(self, model: OnnxModule, inputs: list[TensorSpec]) -> None:
        super().__init__()
        self.model = model
        self.names = [spec.name for spec in inputs]

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, args, strict=True))
        keep = given.pop("logits_to_keep")
        step = Decoding(given["attention_mask"], given["position_ids"], args[4:])
        if "position_ids" not in self.model.inputs:
            given.pop("position_ids")
        token = decoding.set(step)
        try:
            results = self.model(**given)
        finally:
            decoding.reset(token)
        found = dict(zip(self.model.outputs, results, strict=True))
        presents = [found[name.replace(PAST, PRESENT)] for name in self.names[4:]]
        return found["logits"][:, keep], *presents


def raise_updates(program: Program) -> None:
    """Concatenations to a past state are kv_update; logits are chosen before the last product."""
    graph = program.graph
    nodes = graph.find_nodes(op="placeholder")
    past = {n for n, spec in zip(nodes, program.inputs, strict=True) if spec.role == "cache"}
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
        tensors: Any = node.args[0]
        axis = node.args[1] if len(node.args) > 1 else 0
        if len(tensors) == 2 and tensors[0] in past and axis in (2, -2):
            node.target = torch.ops.regraft.kv_update.default
            node.args = tuple(tensors)
    _choose_early(graph, nodes[3])
    program.graph_module.recompile()


def _choose_early(graph: fx.Graph, keep: fx.Node) -> None:
    index = torch.ops.aten.index.Tensor
    products = (torch.ops.aten.linear.default, torch.ops.aten.matmul.default)
    for node in [user for user in keep.users if user.target is index]:
        product: Any = node.args[0]
        if product.target in products and len(product.users) == 1:
            with graph.inserting_before(product):
                chosen = graph.call_function(index, (product.args[0], [None, keep]))
            value = product.args[0].meta["val"]
            chosen.meta = {**node.meta, "val": value.new_empty(
                value.shape[0], keep.meta["val"].shape[0], *value.shape[2:])}  # fmt: skip
            product.args = (chosen, *product.args[1:])
            product.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(product)
            graph.erase_node(node)
