"""Cutting units out of a graph: smaller weights, smaller caches, or no block at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from regraft.passes.base import is_call
from regraft.passes.pruning.blocks import ATTENTION, Block
from regraft.program import Program, RegraftError

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True, eq=False)
class Cut:
    """What is left of a block: the units kept [k], ascending, and either the scale of each of their
    heads or filters [k * parts] (None: 1) or the weight [features, k * width] and bias [features]
    of the layer that reads them."""

    kept: Tensor
    scale: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def cpu(self) -> Cut:
        """The same in main memory."""
        return Cut(*(None if x is None else x.cpu() for x in vars(self).values()))  # type: ignore[arg-type]

    def reading(self, program: Program, block: Block) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the layer that reads what is kept."""
        weight, bias = weights(program, block.output)
        if self.weight is not None:
            made = self.weight.to(weight.device)
            return made, None if self.bias is None else self.bias.to(weight.device)
        weight = weight[:, columns(block, self.kept)]
        if self.scale is not None:
            scale = self.scale.to(weight.device)
            weight = weight * scale.repeat_interleave(block.width // block.parts)
        return weight, bias


def columns(block: Block, kept: Tensor) -> Tensor:
    """The output layer's columns of these units [k * width]."""
    return _rows(kept, block.width)


def weights(program: Program, linear: fx.Node) -> tuple[Tensor, Tensor | None]:
    """Detached weight [out, in] and bias [out] of a linear layer."""
    found = [getattr(program.graph_module, str(a.target)).detach() for a in linear.args[1:] if a]
    return found[0], (found[1] if len(found) > 1 else None)


def cut(program: Program, blocks: Sequence[Block], cuts: Sequence[Cut]) -> None:
    """Leave of each block what its cut keeps; exact: what is cut had no part in the output.

    The shapes that the graph's nodes know are computed anew. RegraftError where a block must
    keep more.
    """
    changed: set[fx.Node] = set()
    for block, left in zip(blocks, cuts, strict=True):
        if len(left.kept) < block.least:
            raise RegraftError(f"{block.name} must keep {block.least} of its {block.kind}")
        if not len(left.kept):
            _remove(program, block, left.reading(program, block)[1])
            continue
        for linear, rows in block.inputs:
            index = _rows(left.kept, rows)
            weight, bias = weights(program, linear)
            _replace(program, linear, weight[index], None if bias is None else bias[index])
        _replace(program, block.output, *left.reading(program, block))
        for node in block.between:
            _resize(node, block, len(left.kept))
        if is_call(block.attention, ATTENTION[0]) and not block.shared:
            _cut_cache(program, block, left.kept)
        changed.update(linear for linear, _ in block.inputs)
        changed.update(block.between)
    _shapes_anew(program.graph, changed)


def _rows(kept: Tensor, width: int) -> Tensor:
    return (kept[:, None] * width + torch.arange(width, device=kept.device)).flatten()


def _replace(program: Program, linear: fx.Node, weight: Tensor, bias: Tensor | None) -> None:
    """The same layer with other weights, under new names."""
    arguments: list[Any] = [linear.args[0], _constant(program, linear, "weight", weight)]
    if bias is not None:
        arguments.append(_constant(program, linear, "bias", bias))
    linear.args = tuple(arguments)


def _constant(program: Program, linear: fx.Node, kind: str, tensor: Tensor) -> fx.Node:
    old: Any = linear.args[1]
    base = str(old.target).removesuffix("_pruned").removesuffix("_weight")
    name = f"{base}_{kind}_pruned"
    parameter = torch.nn.Parameter(tensor.clone().contiguous(), requires_grad=False)
    program.graph_module.register_parameter(name, parameter)
    with program.graph.inserting_before(linear):
        node = program.graph.get_attr(name)
    shown = old.meta["val"]
    fake = isinstance(shown, torch._subclasses.FakeTensor)
    node.meta = {**old.meta, "val": shown.new_empty(tensor.shape) if fake else parameter}
    return node


def _remove(program: Program, block: Block, bias: Tensor | None) -> None:
    """x + block(x) -> x + bias"""
    if bias is not None:
        constant = _constant(program, block.output, "bias", bias)
        block.output.replace_all_uses_with(constant)
        return
    (user,) = block.output.users
    assert block.residual is not None
    user.replace_all_uses_with(block.residual)
    program.graph.erase_node(user)


def _resize(node: fx.Node, block: Block, kept: int) -> None:
    """The size of a reshape that counts heads or their channels counts those kept."""
    if node.target not in RESHAPES:
        return
    given: Any = node.args[1]
    sizes, shape = list(given), node.meta["val"].shape
    source = node.args[0].meta["val"].shape
    for index in reversed(range(len(sizes))):
        if isinstance(shape[index], int) and _counts_units(index, shape, source, block):
            if sizes[index] != -1:
                sizes[index] = shape[index] // block.units * kept
            node.args = (node.args[0], sizes)
            return


def _counts_units(index: int, shape: Any, source: Any, block: Block) -> bool:
    """Whether a dimension of a reshape holds all heads, with or without their channels."""
    if len(shape) == len(source) + 1:
        return index == len(shape) - 2
    if len(shape) == len(source) - 1:
        return index == len(shape) - 1
    return shape[index] % block.units == 0 and index in (1, 2) and len(shape) == 4


def _cut_cache(program: Program, block: Block, kept: Tensor) -> None:
    """The layer's past and present hold the kept heads alone, in signature and examples."""
    assert block.attention is not None
    inputs, outputs = list(program.inputs), list(program.outputs)
    examples = list(program.examples)
    placeholders = program.graph.find_nodes(op="placeholder")
    results: Any = program.graph.output_node().args[0]
    for past in block.attention.args[3:5]:
        index = placeholders.index(past)
        inputs[index] = _with_heads(inputs[index], len(kept))
        if examples:
            examples[index] = examples[index][:, kept].contiguous()
        shown = past.meta["val"]
        past.meta["val"] = shown.new_empty((shown.shape[0], len(kept), *shown.shape[2:]))
    for item in block.attention.users:
        for index, result in enumerate(results):
            if result is item:
                outputs[index] = _with_heads(outputs[index], len(kept))
    program.inputs, program.outputs = tuple(inputs), tuple(outputs)
    program.examples = tuple(examples)


def _with_heads(spec: Any, heads: int) -> Any:
    return replace(spec, shape=(spec.shape[0], heads, *spec.shape[2:]))


def _shapes_anew(graph: fx.Graph, changed: set[fx.Node]) -> None:
    for node in graph.nodes:
        if node not in changed and not (is_call(node, ATTENTION[0]) or _is_present(node)):
            continue
        if is_call(node, aten.linear.default):
            x, weight = (n.meta["val"] for n in node.args[:2])
            node.meta["val"] = x.new_empty((*x.shape[:-1], weight.shape[0]))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            node.meta["val"] = node.target(*args, **kwargs)


def _is_present(node: fx.Node) -> bool:
    """Whether it is a result of a cached attention."""
    source = node.args[0] if node.args else None
    return node.op == "call_function" and is_call(source, ATTENTION[0])
