"""The kernels of a program's caches, compiled before the first token needs them."""

from __future__ import annotations

from typing import Any

import torch

from regraft.program import Program
from regraft.runtime.buffer import RotationTable
from regraft.runtime.lower import new_layer
from regraft.runtime.quantized import QuantizedLayer


@torch.no_grad()
def warm_up(program: Program) -> None:
    """Decode one random token with each kind of quantized layer that the program has."""
    target = torch.ops.regraft.cached_attention.default
    nodes = program.graph.find_nodes(op="call_function", target=target)
    seen = set()
    for node, state in zip(nodes, program.cache.layers, strict=False):
        q, k, v, cos = (_shape(node.args[place]) for place in (0, 1, 2, 6))
        kind = state.format, state.settings, q, k, v, cos, node.args[11:]
        if kind in seen or not isinstance(layer := new_layer(state), QuantizedLayer):
            continue
        seen.add(kind)
        _decode(layer, q, k, v, cos, node.args[11:], node.args[0].meta["val"])


def _shape(node: Any) -> tuple[int, int] | None:
    """Heads and head size of a tensor; the pairs of a rotation."""
    shape = None if node is None else node.meta["val"].shape
    return None if shape is None else (int(shape[1]) if len(shape) == 4 else 0, int(shape[-1]))


def _decode(layer: QuantizedLayer, q: Any, k: Any, v: Any, cos: Any, style: Any, like: Any) -> None:
    table = None if cos is None else RotationTable()
    prompt = layer.sink + layer.tail + layer.key.step
    for length in (prompt, 1):
        if table is not None:
            one = torch.ones(1, length, cos[1], device=like.device)
            table.append(one, torch.zeros_like(one))
        parts = (
            torch.randn(1, heads, length, size, device=like.device, dtype=like.dtype)
            for heads, size in (q, k, v)
        )
        layer.step(*parts, table, interleaved=style[0] == "interleaved", offset=style[1])
