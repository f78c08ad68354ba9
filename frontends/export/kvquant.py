"""Quantized layers in an export: their state as inputs and outputs, and the function's inputs."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch

from regraft.frontends.export.builder import DTYPES, FLOAT, INT, Builder, State
from regraft.kernels.kvquant import onnx
from regraft.kernels.kvquant.feedback import feedback
from regraft.kernels.kvquant.onnx import Side
from regraft.kernels.kvquant.reference import cap
from regraft.program import LayerState, Program
from regraft.runtime.lower import new_layer
from regraft.runtime.quantized import Coding, pairs


def quantized_lengths(program: Program) -> Program:
    """Let the number of past tokens follow from the mask where layers keep only some exactly."""
    caches = [spec.name for spec in program.inputs if spec.role == "cache"]
    quantized = {
        name for i, name in enumerate(caches) if program.cache.layers[i // 2].format != "dense"
    }
    if not quantized:
        return program
    graph = program.graph
    nodes = graph.find_nodes(op="placeholder")
    held = [n for n, spec in zip(nodes, program.inputs, strict=True) if spec.name in quantized]
    sizes = torch.ops.aten.sym_size.int
    found = [
        node for node in graph.find_nodes(op="call_function", target=sizes)
        if node.args[0] in held and node.args[1] == 2
    ]  # fmt: skip
    if found:
        with graph.inserting_before(found[0]):
            total, new = (graph.call_function(sizes, (nodes[i], 1)) for i in (1, 0))
            past = graph.call_function(operator.sub, (total, new))
        for node in found:
            node.replace_all_uses_with(past)
            graph.erase_node(node)

    def renamed(spec: Any, name: str) -> Any:
        own = spec.name.replace("present.", "past_key_values.") in quantized
        return replace(spec, shape=(*spec.shape[:2], name, spec.shape[3])) if own else spec

    inputs = tuple(renamed(spec, "exact_length") for spec in program.inputs)
    outputs = tuple(renamed(spec, "new_exact_length") for spec in program.outputs)
    return replace(program, inputs=inputs, outputs=outputs)


def attend(
    b: Builder, prefix: str, state: LayerState, q: Any, k: Any, v: Any, past_key: Any,
    past_value: Any, mask: Any, turn: tuple[Any, ...], sinks: Any, scale: float, softcap: float,
) -> list[ir.Value]:  # fmt: skip
    """Output, exact keys and exact values of a layer; the rest of its state becomes inputs and
    outputs of the model, whose names begin with prefix."""
    layer: Any = new_layer(state)
    cos, sin, interleaved, offset = turn
    heads, size = int(k.shape[1]), int(k.shape[3])
    rotated = 0 if cos is None else int(cos.shape[-1])
    order = pairs(size, rotated, interleaved, offset)
    if order is not None:
        q, k = (_ordered(b, x, order) for x in (q, k))
        layer.key.arrange(order)
    if cos is not None:
        cos, sin = _table(b, cos, sin, size // 2, q)
    sides = tuple(
        _side(kind, coding, heads, int(x.shape[3]))
        for kind, coding, x in (("key", layer.key.coding, k), ("value", layer.value.coding, v))
    )
    given = {"key": past_key, "value": past_value}
    padded = None
    if layer.sink and mask is not None and mask.dtype == ir.DataType.BOOL:
        padded = _padding(b, layer.sink, past_key)
    states = {name: part for side in sides for name, part in side.state.items()}
    for name, (shape, dtype) in states.items():
        given[name] = _input(b, f"{prefix}.{name}", shape, dtype)
    for side, coding in zip(sides, (layer.key.coding, layer.value.coding), strict=True):
        for name, tensor in _tensors(coding).items():
            target = f"{prefix.replace('past_key_values', 'kvquant')}.{side.kind}_{name}"
            given[f"{side.kind}_{name}"] = b.weights.made(target, tensor)
    out, key, value, *made = b.call(
        *("KVQuantAttention", onnx.cached_attention, q, k, v, mask, padded, cos, sin, sinks),
        *given.values(),
        outputs=3 + len(states), names=tuple(given), sides=sides, sink=layer.sink, tail=layer.tail,
        spread=layer.spread, scale=scale, softcap=softcap,
    )  # fmt: skip
    for (name, (shape, dtype)), value_ in zip(states.items(), made, strict=True):
        _output(b, f"{prefix}.{name}", value_, shape, dtype)
    return [out, key, value]


def _side(kind: str, coding: Coding, heads: int, size: int) -> Side:
    group = coding.group if kind == "key" and coding.scale is None else 0
    return Side(kind, coding.bits, cap(coding.outliers, heads * size), heads, size, group)


def _tensors(coding: Coding) -> dict[str, torch.Tensor]:
    found: dict[str, Any] = {
        "levels": coding.book.levels.float() * coding.book.unit,
        "midpoints": coding.book.midpoints,
        "scale": coding.scale,
        "zero": coding.zero,
    }
    if coding.fisher is not None:
        learned = feedback(coding.fisher, coding.scale)
        found |= {"matrix": learned.matrix, "weight": learned.weight}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _ordered(b: Builder, x: ir.Value, order: torch.Tensor) -> ir.Value:
    made = b.op("Gather", x, b.constant(order), axis=3)
    made.shape = x.shape
    return made


def _table(b: Builder, cos: ir.Value, sin: ir.Value, half: int, like: ir.Value) -> Any:
    """Cosines and sines [B, T, D/2] of all positions, as state that a table's layers share."""
    if cos not in b.tables:
        number = f".{len(b.tables)}" if b.tables else ""
        tables = []
        for name, x, rest in (("cos", cos, 1.0), ("sin", sin, 0.0)):
            wide = b.op("Concat", b.size(like, 0), b.constant([1, 1]), axis=0)
            x = b.op("Expand", b.to(x, FLOAT), wide)
            if missing := half - int(cos.shape[-1]):  # type: ignore[index, arg-type]
                x = b.op("Pad", x, b.constant([0, 0, 0, 0, 0, missing]), b.constant(rest))
            shape = ("batch_size", "past_sequence_length", half)
            past = _input(b, f"past_key_values.{name}{number}", shape, FLOAT)
            whole = b.op("Concat", past, x, axis=1)
            _output(b, f"past_key_values.{name}{number}", whole, shape, FLOAT)
            whole.shape = ir.Shape([None, None, half])
            tables.append(whole)
        b.tables[cos] = tuple(tables)
    return b.tables[cos]


def _padding(b: Builder, sink: int, past_key: ir.Value) -> ir.Value:
    """Padding [B] in front of each row of the prompt, as state that layers of equal sinks share;
    0 where a row has fewer tokens than the sink. See ``runtime.quantized``."""
    if sink not in b.padding:
        number = f".{len(b.padding)}" if b.padding else ""
        past = _input(b, f"past_key_values.padding{number}", ("batch_size",), INT)
        real = b.to(b.given["attention_mask"], torch.int32)
        first = b.op("ArgMax", real, dtype=INT, axis=1, keepdims=0)
        last = b.op("ReduceMax", first, keepdims=0)
        fewest = b.op("Sub", b.squeeze(b.size(real, 1), 0), last)
        enough = b.op("GreaterOrEqual", fewest, b.constant(sink), dtype=torch.bool)
        found = b.op("Where", enough, first, b.constant([0]), dtype=INT)
        start = b.op("Equal", b.size(past_key, 2), b.constant([0]), dtype=torch.bool)
        now = b.op("Where", start, found, past, dtype=INT)
        _output(b, f"past_key_values.padding{number}", now, ("batch_size",), INT)
        now.shape = past.shape
        b.padding[sink] = now
    return b.padding[sink]


def _input(b: Builder, name: str, shape: Any, dtype: torch.dtype) -> ir.Value:
    if name not in b.given:
        kind = ir.TensorType(DTYPES[dtype])
        b.given[name] = ir.Value(name=name, shape=ir.Shape(shape), type=kind)
    return b.given[name]


def _output(b: Builder, name: str, value: ir.Value, shape: Any, dtype: torch.dtype) -> None:
    b.presents[name] = State(value, tuple(shape), dtype)
