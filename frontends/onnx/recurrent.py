"""ONNX language models with recurrent states that Regraft exported, as programs again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from regraft.frontends.guards import longest_context
from regraft.frontends.onnx.module import OnnxModule
from regraft.frontends.onnx.step import PAST, PRESENT, Step, raise_updates
from regraft.frontends.onnx.values import DTYPES
from regraft.frontends.recurrent import token_range
from regraft.frontends.tracing import trace
from regraft.program import CacheSpec, LayerState, Program, RegraftError, TensorSpec

ROWS, BEFORE, QUERIES, PADDING = 2, 7, 3, 2
TOKENS = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
ROLES = ("ids", "mask", "positions", "positions")


def capture_recurrent(module: OnnxModule, recurrent: list[str], vocab: int) -> Program:
    """The program of one token, and the ``prefill`` of several where the loops of the model do not
    count them one by one; see ``frontends.recurrent.capture_recurrent``.

    recurrent: the names of the states; vocab: ids lie below it.
    """
    caches = [n for n in module.inputs if n.startswith(PAST) and n not in recurrent]
    specs = [_spec(module, name, "cache") for name in caches]
    specs += [_spec(module, name, "state") for name in recurrent]
    examples = _examples(module, specs, vocab)
    try:
        program = _program(module, specs, examples, 1, ROWS)
    except RegraftError:
        if caches:
            raise
        program = _program(module, specs, examples, 1, 1)
        program.metadata["prefill"] = "it mixes the rows of a batch"
        return program
    try:
        program.prefill = _program(module, specs, examples, QUERIES, ROWS)
    except RegraftError as error:
        program.metadata["prefill"] = str(error)
    return program


def _spec(module: OnnxModule, name: str, role: str) -> TensorSpec:
    value = module.input_values[module.inputs.index(name)]
    dims = [n.value if isinstance(n, ir.SymbolicDim) else n for n in value.shape or ()]
    if any(n not in (None, "batch_size", "past_sequence_length") and isinstance(n, str)
           for n in dims) or value.dtype not in DTYPES:  # fmt: skip
        raise RegraftError(f"input {name} is none of a language model with a dense cache")
    return TensorSpec(name, tuple(dims), DTYPES[value.dtype], role)  # type: ignore[arg-type, index]


def _examples(module: OnnxModule, specs: list[TensorSpec], vocab: int) -> dict[str, Tensor]:
    """A padded prompt, and the states behind its first tokens."""
    length = BEFORE + QUERIES
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(ROWS, length, dtype=torch.long)
    mask[0, :PADDING] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ids = torch.randint(3, max(4, vocab), (ROWS, length), generator=generator)
    sizes: dict[Any, Any] = {"batch_size": ROWS, "past_sequence_length": 0}
    empty = {s.name: torch.zeros([sizes.get(n, n) for n in s.shape], dtype=s.dtype) for s in specs}
    whole = dict(zip(TOKENS, (ids, mask, positions), strict=False))
    given = {name: x[:, :BEFORE] for name, x in whole.items() if name in module.inputs}
    with torch.no_grad():
        found = dict(zip(module.outputs, module(**given, **empty), strict=True))
    return whole | {s.name: found[s.name.replace(PAST, PRESENT, 1)] for s in specs}


def _program(
    module: OnnxModule, specs: list[TensorSpec], examples: dict[str, Tensor], count: int, rows: int
) -> Program:
    """The step over count tokens; rows: two for any number of rows, else one."""
    batch: int | str = "batch_size" if rows > 1 else 1
    shape = (batch, "sequence_length" if count > 1 else 1)
    shapes = (shape, (batch, "total_sequence_length"), shape, ("kept",))
    inputs = [
        TensorSpec(*given[:2], torch.long, given[2])
        for given in zip(TOKENS, shapes, ROLES, strict=True)
    ]
    stop = BEFORE + count
    ids, mask, positions = (examples[name][:rows] for name in TOKENS[:3])
    tensors = [ids[:, BEFORE:stop], mask[:, :stop], positions[:, BEFORE:stop]]
    tensors.append(torch.arange(5) % count)
    for spec in specs:
        state = examples[spec.name]
        tensors.append(state.narrow(spec.shape.index("batch_size"), 0, rows)
                       if "batch_size" in spec.shape else state)  # fmt: skip
    inputs += specs
    own = [
        spec if rows > 1 else replace(spec, shape=tuple(1 if n == "batch_size" else n
                                                        for n in spec.shape))
        for spec in inputs
    ]  # fmt: skip
    dynamic = [tuple(i for i, n in enumerate(s.shape) if isinstance(n, str)) for s in own]
    traced, names, fakes = trace(Step(module, inputs), inputs, tensors, dynamic)
    outputs = [TensorSpec("logits", ("batch_size", "kept", "vocab"), _logits(module), "logits")]
    for spec in specs:
        sizes = ("total_sequence_length" if n == "past_sequence_length" else n for n in spec.shape)
        name = spec.name.replace(PAST, PRESENT, 1)
        outputs.append(replace(spec, name=name, shape=tuple(sizes)))
    layers = tuple(LayerState() for spec in specs if spec.name.endswith(".key"))
    states = tuple(spec for spec in specs if spec.role == "state")
    program = Program(
        traced, tuple(inputs), tuple(outputs), CacheSpec(layers, states), tuple(tensors),
        {"parameters": names}, (1, 1) if count == 1 else token_range(fakes[0].shape[1]),
        context=longest_context(inputs, fakes, at_once=False),
    )  # fmt: skip
    raise_updates(program)
    return program


def _logits(module: OnnxModule) -> torch.dtype:
    return next(DTYPES[v.dtype] for v in module.plan.outputs if v.name == "logits")  # type: ignore
