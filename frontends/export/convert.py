"""Programs to ONNX models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from regraft.frontends.export.builder import DOMAIN, DTYPES, Builder, State, Weights, rank
from regraft.frontends.export.sequence import sequence
from regraft.frontends.export.step import step
from regraft.program import Program, TensorSpec

IR_VERSION = 10
PAST, PRESENT = "past_key_values.", "present."
ROWS = ("batch_size", "sequence_length")
SHAPES = {"ids": ROWS, "positions": ROWS, "mask": ("batch_size", "total_sequence_length")}


def convert(program: Program, builder: Builder, producer_version: str) -> ir.Model:
    """The program as a model whose weights share the program's memory.

    RegraftError names the first operator that ONNX has no form of here.
    """
    names = [part.metadata.get("parameters", {}) for part in program.parts.values()]
    builder.cache = program.cache
    builder.weights = weights = Weights({k: v for known in names[::-1] for k, v in known.items()})
    given = {spec.name: _input(spec) for spec in _any_number(program.inputs)}
    run = step if program.tokens[1] is None else sequence
    results = run(builder, program, given)
    specs = _any_number(program.outputs)
    outputs = [_output(builder, *pair) for pair in zip(specs, results, strict=True)]
    outputs += [
        _output(builder, _after(name, state), state.value)
        for name, state in builder.presents.items()
    ]
    graph = ir.Graph(
        list(given.values()),
        outputs,
        nodes=builder.nodes,
        initializers=[value for value in weights.values.values() if value.uses()],
        opset_imports={"": builder.opset}
        | ({DOMAIN: 1} if builder.functions else {})
        | ({"com.microsoft": 1} if builder.fused else {}),
        name="regraft",
    )
    keep_transposed(graph)
    return ir.Model(
        graph,
        ir_version=IR_VERSION,
        producer_name="regraft",
        producer_version=producer_version,
        functions=list(builder.functions.values()),
    )


def _any_number(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The specs of a step over one token or row as those of one over any number."""
    return [replace(spec, shape=SHAPES.get(spec.role, spec.shape)) for spec in specs]


def _input(spec: TensorSpec) -> ir.Value:
    kind = ir.TensorType(DTYPES[spec.dtype])
    return ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=kind)


def _output(b: Builder, spec: TensorSpec, result: ir.Value) -> ir.Value:
    value = b.op("Identity", result, dtype=spec.dtype)
    value.name, value.shape = spec.name, ir.Shape(spec.shape)
    return value


def _after(name: str, state: State) -> TensorSpec:
    """What a state that a layer keeps beside its keys and values is as an output."""
    sizes = tuple(f"new_{n}" if isinstance(n, str) and i else n for i, n in enumerate(state.shape))
    return TensorSpec(name.replace(PAST, PRESENT, 1), sizes, state.dtype, "cache")


def keep_transposed(graph: ir.Graph) -> None:
    """Store matrices that are only used transposed the other way round, without the Transpose."""
    for weight in list(graph.initializers.values()):
        users = [use.node for use in weight.uses()]
        if not users or any(n.op_type != "Transpose" for n in users) or rank(weight) != 2:
            continue
        turned = _turned(weight)
        weight.const_value, weight.shape = turned, turned.shape
        for node in users:
            ir.convenience.replace_all_uses_with(node.outputs[0], weight)
            node.graph.remove(node, safe=True)


def _turned(weight: ir.Value) -> ir.LazyTensor:
    """The matrix the other way round, made when it is written."""
    tensor, name = weight.const_value, weight.name
    assert tensor is not None

    def make() -> ir.Tensor:
        return ir.Tensor(tensor.numpy().T.copy(), name=name)

    rows, columns = (int(n) for n in tensor.shape)  # type: ignore[arg-type]
    return ir.LazyTensor(make, dtype=tensor.dtype, shape=ir.Shape([columns, rows]), name=name)
