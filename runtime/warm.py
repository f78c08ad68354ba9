"""The kernels of a program's caches, compiled before the first token needs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from regraft.kernels.linear import packed
from regraft.program import Program
from regraft.program.program import spec_of
from regraft.program.serialize import tensors_of
from regraft.runtime.buffer import RotationTable
from regraft.runtime.lower import new_layer
from regraft.runtime.quantized import QuantizedLayer


@torch.no_grad()
def warm_up(program: Program) -> None:
    """Decode a random token with each kind of layer that the program has."""
    if not program.cache.kernels:
        return
    target = torch.ops.regraft.cached_attention.default
    nodes = program.graph.find_nodes(op="call_function", target=target)
    weights = tensors_of(program.graph_module).values()
    device = next((tensor.device for tensor in weights), torch.device("cpu"))
    if device.type == "cpu":
        packed.prepare(set(_packed_formats(program)))
    seen = set()
    for node, state in zip(nodes, program.cache.layers, strict=False):
        parts: list[Any] = [spec_of(node.args[place]) for place in (0, 1, 2)]
        turn: Any = node.args[6] and spec_of(node.args[6])
        pairs = turn and turn[1][-1]
        kind = (state.format, state.settings, *parts, pairs, node.args[11:])
        if kind in seen:
            continue
        seen.add(kind)
        layer = new_layer(state)
        quantized = isinstance(layer, QuantizedLayer)
        prompt = layer.sink + layer.tail + layer.key.step if quantized else 32
        table = RotationTable() if pairs else None
        for length in (prompt, 1):
            if table is not None:
                table.append(*_rotation(length, pairs, device))
            qkv = (
                torch.randn(1, shape[1], length, shape[3], device=device).to(dtype)
                for dtype, shape in parts
            )
            style, offset = node.args[11:]
            layer.step(*qkv, table, interleaved=style == "interleaved", offset=offset)


def _packed_formats(program: Program) -> Iterator[tuple[str, bool]]:
    """(format, whether there is a bias) of packed linear layers, those in regions included."""
    for part in program.parts.values():
        for module in part.graph_module.modules():
            if isinstance(module, fx.GraphModule):
                target = torch.ops.regraft.packed_linear.default
                for node in module.graph.find_nodes(op="call_function", target=target):
                    yield str(node.args[3]), node.args[2] is not None


def _rotation(length: int, pairs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angle = torch.rand(1, length, pairs, device=device)
    return angle.cos(), angle.sin()
