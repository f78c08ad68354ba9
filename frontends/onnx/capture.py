"""ONNX models to a Program: traced where no shape depends on data, else called as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import getitem
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from regraft.frontends.module import capture_module
from regraft.frontends.onnx.module import OnnxModule
from regraft.frontends.onnx.values import DTYPES
from regraft.program import Program, RegraftError, TensorSpec

Sizes = dict[str, int]
_TRIED = (
    (2, 3, 5, 7, 11, 13),
    (2, 64, 96, 128, 160, 192),
    (2, 224, 256, 320),
    (1, 224, 256, 320),
    (1, 512, 1024, 1536),
)
"""Sizes of the dynamic dimensions that examples are made with, the first ones of batches."""


def capture_onnx(
    source: str | Path | bytes | onnx.ModelProto | OnnxModule, example_inputs: Any = None
) -> Program:
    """The program of an ONNX model; RegraftError where it cannot be read.

    example_inputs: a tuple in the graph's order or a dict by name; made up where absent. Dynamic
    dimensions keep the file's names; those that the model fixes become numbers. A model whose
    shapes or control flow depend on data is one call of the OnnxModule, and
    ``metadata["python"]`` says why.
    """
    module = source if isinstance(source, OnnxModule) else OnnxModule(source)
    module.eval()
    examples, reason = None, ""
    try:
        examples = _given(module, example_inputs) or _made(module)
        program = _traced(module, examples)
    except RegraftError as error:
        reason = str(error)
        program = _called(module, examples, _innermost(error))
    program.metadata["whole" if reason else "onnx"] = module
    return program


def _given(module: OnnxModule, example_inputs: Any) -> list[Tensor] | None:
    if example_inputs is None:
        return None
    if isinstance(example_inputs, Mapping):
        missing = [name for name in module.inputs if name not in example_inputs]
        if missing:
            raise RegraftError(f"example_inputs has no {missing[0]}: give {module.inputs}")
        return [example_inputs[name] for name in module.inputs]
    given = [example_inputs] if torch.is_tensor(example_inputs) else list(example_inputs)
    if len(given) != len(module.inputs):
        raise RegraftError(f"{len(given)} example_inputs, the graph takes {module.inputs}")
    return given


def _made(module: OnnxModule) -> list[Tensor]:
    """Inputs of sizes with which the model runs."""
    first: RegraftError | None = None
    for sizes in _candidates(module.input_values):
        examples = [_example(value, sizes) for value in module.input_values]
        try:
            with torch.no_grad():
                module(*examples)
        except RegraftError as error:
            first = first or error
            continue
        return examples
    raise first or RegraftError("no example inputs could be made")


def dimensions(value: ir.Value) -> list[int | str]:
    """The sizes of an input; dynamic ones by name, by input and position where they have none."""
    shape = value.shape if value.shape is not None else ()
    return [
        dim if isinstance(dim, int) and dim >= 0 else _named(dim) or f"{value.name}_dim{index}"
        for index, dim in enumerate(shape)
    ]


def _named(dim: int | ir.SymbolicDim) -> str | None:
    """The name of a dynamic size; files write -1 or a question mark for those without."""
    return None if isinstance(dim, int) or not re.search(r"\w", dim.value or "") else dim.value


def _candidates(values: list[ir.Value]) -> Iterator[Sizes]:
    names = [(d, i) for v in values for i, d in enumerate(dimensions(v)) if isinstance(d, str)]
    first = {name: index for name, index in reversed(names)}
    for tried in _TRIED:
        sizes: Sizes = {}
        rest = iter([*tried[1:]] * len(first))
        for name in sorted(first, key=lambda name: "+" in name):
            if "+" in name:
                parts = re.findall(r"\w+", name)
                sizes[name] = sum(int(p) if p.isdigit() else sizes.get(p, 0) for p in parts)
            else:
                batch = first[name] == 0 or "batch" in name.lower()
                sizes[name] = tried[0] if batch else next(rest)
        yield sizes
        if not first:
            return


def _example(value: ir.Value, sizes: Sizes) -> Tensor:
    if not isinstance(value.type, ir.TensorType) or value.dtype not in DTYPES:
        raise RegraftError(f"input {value.name} is no tensor of numbers")
    if value.shape is None:
        raise RegraftError(f"input {value.name} has no shape: give example_inputs")
    dtype = DTYPES[value.dtype]
    shape = [sizes[d] if isinstance(d, str) else d for d in dimensions(value)]
    if dtype.is_floating_point and dtype.itemsize > 1:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(dtype)
    ones = dtype == torch.bool or "mask" in (value.name or "").lower()
    return torch.full(shape, int(ones), dtype=torch.uint8).to(dtype)


class _Positional(nn.Module):
    """The module with positional inputs alone, as torch.export names them."""

    def __init__(self, model: OnnxModule) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*inputs)


def _traced(module: OnnxModule, examples: list[Tensor]) -> Program:
    if not examples:
        raise RegraftError("the graph has no inputs")
    names = [
        {i: d for i, d in enumerate(dimensions(value)) if isinstance(d, str)}
        for value in module.input_values
    ]
    step = _Positional(module)
    try:
        program = _export(step, examples, _strict(names, examples), names, module)
    except RegraftError as error:
        if "specialized" not in str(error) and "constraint" not in str(error.__cause__).lower():
            raise
        loose = [{i: Dim.AUTO for i in dims} for dims in names]
        program = _export(step, examples, loose, names, module)
    program.inputs = tuple(
        replace(spec, name=name) for spec, name in zip(program.inputs, module.inputs, strict=True)
    )
    made = [name for name, kept in zip(module.outputs, program.metadata["results"], strict=True)
            if kept is None]  # fmt: skip
    program.outputs = tuple(
        replace(spec, name=name) for spec, name in zip(program.outputs, made, strict=True)
    )
    program.metadata["arguments"] = program.metadata["forward"] = list(module.inputs)
    _refuse_fixed(module, examples, names, program)
    return program


def _refuse_fixed(
    module: OnnxModule, examples: list[Tensor], names: list[dict[int, str]], program: Program
) -> None:
    """RegraftError where the trace fixes a size that the model itself leaves free."""
    left = {name for spec in program.inputs for name in spec.shape}
    for name in dict.fromkeys(name for given in names for name in given.values()):
        if name in left:
            continue
        larger = [
            torch.cat([x] * 2, axis) if axis is not None else x
            for x, given in zip(examples, names, strict=True)
            for axis in [next((i for i, d in given.items() if d == name), None)]
        ]
        try:
            with torch.no_grad():
                module(*larger)
        except RegraftError:
            continue
        raise RegraftError(f"the steps of the model depend on the size {name}")


def _strict(names: list[dict[int, str]], examples: list[Tensor]) -> list[dict[int, Any]]:
    """Dynamic sizes that must stay dynamic, whatever their range."""
    dims: dict[str, Any] = {}
    for given in names:
        for name in given.values():
            plain = name.isidentifier()
            dims.setdefault(name, Dim.DYNAMIC if plain else Dim.AUTO)
    return [{i: dims[name] for i, name in given.items()} for given in names]


def _export(
    step: nn.Module, examples: list[Tensor], dims: list, names: list, module: OnnxModule
) -> Program:
    return capture_module(step, tuple(examples), (tuple(dims),), names, wraps=module)


def _called(module: OnnxModule, examples: list[Tensor] | None, reason: str) -> Program:
    """A graph whose one operator runs the whole model."""

    def run_onnx(*inputs: Any) -> tuple:
        results = module(*inputs)
        return results if len(module.outputs) > 1 else (results,)

    graph = fx.Graph()
    placeholders = [graph.placeholder(f"input_{i}") for i in range(len(module.inputs))]
    call = graph.call_function(run_onnx, tuple(placeholders))
    results = [graph.call_function(getitem, (call, i)) for i in range(len(module.outputs))]
    graph.output(tuple(results))
    plan = module.plan
    inputs = tuple(_spec(value, "input") for value in module.input_values)
    outputs = tuple(_spec(value, "output") for value in plan.outputs)
    leaves = [0] * len(inputs)
    held = list(range(len(outputs)))
    metadata = {
        "arguments": list(module.inputs),
        "forward": list(module.inputs),
        "constants": {},
        "in_spec": pytree.tree_structure((tuple(leaves), {})),
        "out_spec": pytree.tree_structure(tuple(held) if len(held) > 1 else 0),
        "parameters": {},
        "results": [None] * len(outputs),
        "device": "cpu",
        "python": reason,
    }
    root = fx.GraphModule(nn.Module(), graph)
    return Program(root, inputs, outputs, examples=(), metadata=metadata)


def _spec(value: ir.Value, role: str) -> TensorSpec:
    dtype = DTYPES.get(value.dtype or 0, torch.float32)
    return TensorSpec(value.name or "", tuple(dimensions(value)), dtype, role)


def _innermost(error: BaseException) -> str:
    """The reason that lies deepest: which operator met what."""
    shown = str(error)
    while error.__cause__ is not None:
        error = error.__cause__
        if isinstance(error, RegraftError):
            shown = str(error)
    return shown
