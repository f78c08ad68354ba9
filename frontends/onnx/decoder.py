"""An ONNX language model with a cache to the program that a captured one has."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from regraft.frontends.huggingface import decoder, signature
from regraft.frontends.onnx.module import OnnxModule
from regraft.frontends.onnx.recurrent import capture_recurrent
from regraft.frontends.onnx.step import PAST, Step, raise_updates
from regraft.frontends.onnx.values import DTYPES
from regraft.program import Program, RegraftError
from regraft.program.program import tracing


def capture_decoder(path: Path, vocab: int) -> Program:
    """The program of a model with the names of optimum and onnxruntime-genai: input_ids,
    attention_mask, position_ids if it takes them, past_key_values.{i}.key and .value; logits,
    present.{i}.key and .value. vocab: ids lie below it. Recurrent states are known by Regraft's
    metadata; see ``capture_recurrent``.

    RegraftError for models with other inputs, a quantized cache among them.
    """
    module = OnnxModule(path)
    recurrent = json.loads(module.metadata.get("regraft_states", "[]"))
    if recurrent:
        with tracing:
            return capture_recurrent(module, recurrent, vocab)
    states = _states(module)
    dtype = next(DTYPES[value.dtype] for value in module.plan.outputs if value.name == "logits")  # type: ignore[index]
    with tracing:
        given = signature(vocab, states, torch.device("cpu"))
        program = decoder(Step(module, given[0]), *given, dtype)
    raise_updates(program)
    return program


def _states(module: OnnxModule) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of no tokens, for each layer."""
    known = {value.name: value for value in module.input_values}
    layers = sum(name.startswith(PAST) and name.endswith(".key") for name in module.inputs)
    wanted = [f"{PAST}{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    others = {"input_ids", "attention_mask", "position_ids"}
    if extra := [name for name in module.inputs if name not in {*wanted, *others}]:
        raise RegraftError(f"input {extra[0]} is none of a language model with a dense cache")
    needed = ["input_ids", "attention_mask", *wanted]
    if missing := [name for name in needed if name not in known]:
        raise RegraftError(f"input {missing[0]} is missing: no language model with a cache")
    if not layers or "logits" not in module.outputs:
        raise RegraftError("the model has no cache or no logits: not a language model with a cache")
    made = []
    for name in wanted:
        value = known[name]
        dims = list(value.shape) if value.shape is not None else []
        if len(dims) != 4 or not (isinstance(dims[1], int) and isinstance(dims[3], int)):
            raise RegraftError(f"input {name} is not [batch, heads, past, head_dim]")
        made.append(torch.empty(1, dims[1], 0, dims[3], dtype=DTYPES[value.dtype]))  # type: ignore
    return list(zip(made[::2], made[1::2], strict=True))
