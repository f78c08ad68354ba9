"""An ONNX language model with a cache to the program that a captured one has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from regraft.frontends.huggingface import decoder, signature
from regraft.frontends.onnx.module import OnnxModule
from regraft.frontends.onnx.recurrent import capture_recurrent
from regraft.frontends.onnx.step import PAST, Step, raise_updates
from regraft.frontends.onnx.values import DTYPES
from regraft.frontends.trial import TOLERANCE
from regraft.kernels.linear.packed import unrounded
from regraft.program import Program, RegraftError
from regraft.program.config import head_sizes
from regraft.program.program import tracing


def capture_decoder(path: Path, config: Any) -> Program:
    """The program of a model with the names of optimum and onnxruntime-genai: input_ids,
    attention_mask, position_ids if it takes them, past_key_values.{i}.key and .value; logits,
    present.{i}.key and .value. config: what transformers says of the model, which has the sizes
    that the file leaves open. Recurrent states are known by Regraft's metadata; see
    ``capture_recurrent``.

    RegraftError for models with other inputs, a quantized cache among them, and where the
    program computes something else than the file.
    """
    module = OnnxModule(path).eval()
    text = config.get_text_config(decoder=True)
    recurrent = json.loads(module.metadata.get("regraft_states", "[]"))
    if recurrent:
        with tracing:
            return capture_recurrent(module, recurrent, text.vocab_size)
    states = _states(module, text)
    dtype = next(DTYPES[value.dtype] for value in module.plan.outputs if value.name == "logits")  # type: ignore[index]
    with tracing:
        given = signature(text.vocab_size, states, torch.device("cpu"))
        program = decoder(Step(module, given[0]), *given, dtype)
    _raise_products(program)
    raise_updates(program)
    _agree(module, program)
    return program


def _states(module: OnnxModule, config: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of no tokens, for each layer."""
    open_sizes = dict(zip((1, 3), head_sizes(config), strict=True))
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
        if len(dims) != 4:
            raise RegraftError(f"input {name} is not [batch, heads, past, head_dim]")
        heads, size = (dims[i] if isinstance(dims[i], int) else open_sizes[i] for i in (1, 3))
        if heads is None or size is None:
            raise RegraftError(f"input {name}: neither the file nor its config gives the heads")
        made.append(torch.empty(1, heads, 0, size, dtype=DTYPES[value.dtype]))  # type: ignore
    return list(zip(made[::2], made[1::2], strict=True))


def _agree(module: OnnxModule, program: Program) -> None:
    """Raise RegraftError unless tokens behind others, none of them padding, have the logits that
    the file gives them, operator by operator."""
    ids, mask, positions, keep, *past = program.examples
    mask = torch.ones_like(mask)
    positions = torch.arange(past[0].shape[2], mask.shape[1]).expand_as(ids).contiguous()
    names = [spec.name for spec in program.inputs]
    given = dict(zip(names, (ids, mask, positions, keep, *past), strict=True))
    with unrounded():
        wanted = module(**{name: x for name, x in given.items() if name in module.inputs})
        want = wanted[module.outputs.index("logits")].float()
        error = (program(*given.values())[0].float() - want).abs().max() / want.abs().max()
    if not error <= max(TOLERANCE, 32 * torch.finfo(program.outputs[0].dtype).eps):
        raise RegraftError(
            f"the captured logits differ from the file's by {error:.1e} of their scale: its masks "
            "or positions are not those of attention_mask and position_ids"
        )


def _raise_products(program: Program) -> None:
    """x @ w is linear(x, w') where w is a weight, or the transpose of one."""
    module, graph = program.graph_module, program.graph
    names = program.metadata["parameters"]
    swapped: dict[fx.Node, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default):
        weight: Any = node.args[1]
        if weight.meta["val"].dim() != 2 or node.args[0].meta["val"].dim() < 2:
            continue
        if weight.op == "get_attr" and weight not in swapped:
            old = str(weight.target)
            held = nn.Parameter(getattr(module, old).t().contiguous(), requires_grad=False)
            module.register_parameter(f"{old}_swapped", held)
            names[f"{old}_swapped"] = f"{names.get(old, old)}_swapped"
            with graph.inserting_before(weight):
                swapped[weight] = graph.get_attr(f"{old}_swapped")
            swapped[weight].meta = {**weight.meta, "val": held}
        elif not (
            weight.target is torch.ops.aten.permute.default and weight.args[0].op == "get_attr"
        ):
            continue
        node.target = torch.ops.aten.linear.default
        node.args = (node.args[0], swapped.get(weight) or weight.args[0])
    graph.eliminate_dead_code()
    for node in swapped:
        if not node.users and not any(n.target == node.target for n in graph.nodes):
            delattr(module, str(node.target))
            names.pop(str(node.target), None)
