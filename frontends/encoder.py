"""Hugging Face models without generation (encoders and their heads) to a Program."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from regraft.frontends.huggingface import as_it_is, close, registered
from regraft.frontends.module import arguments, capture_module
from regraft.program import InputError, Program

BATCH, LENGTH = 2, 11
TEXT = ("input_ids", "attention_mask", "token_type_ids")


def capture_encoder(
    model: PreTrainedModel, inputs: Any = None, dynamic_shapes: Any = None
) -> Program:
    """Program of one call, attention by our operator; outputs in the model's own ModelOutput.

    Without inputs: input_ids, attention_mask and token_type_ids [batch_size,
    sequence_length] as far as forward takes them, or pixel_values [batch_size, channels, height,
    width] of the configured size.
    """
    names = None
    if inputs is None:
        inputs, names = example_inputs(model, type(model).__name__)
        dynamic_shapes = {name: dict.fromkeys(dims, Dim.DYNAMIC) for name, dims in names.items()}
        accepted = inspect.signature(model.forward).parameters
        fixed = {"use_cache": False} if "use_cache" in accepted else {}
        inputs |= fixed
        dynamic_shapes |= dict.fromkeys(fixed)
        names |= dict.fromkeys(fixed, {})
    with registered(model):
        program = capture_module(model, inputs, dynamic_shapes, names)
    if not _agrees(model, program, inputs):
        program = capture_module(model, inputs, dynamic_shapes, names)
    return program


def _agrees(model: PreTrainedModel, program: Program, inputs: Any) -> bool:
    """Whether the program gives the model's outputs: not where only masks follow the registry."""
    args, kwargs = arguments(inputs)
    with as_it_is(model), torch.no_grad():
        output = model(*args, **kwargs)
    expected = [leaf for leaf in pytree.tree_leaves(output) if torch.is_tensor(leaf)]
    return all(map(close, expected, program(*program.examples)))


def example_inputs(
    model: PreTrainedModel, name: str
) -> tuple[dict[str, Any], dict[str, dict[int, str]]]:
    """Keyword inputs that the configuration describes, and the names of their dynamic sizes."""
    accepted = inspect.signature(model.forward).parameters
    config, main = model.config, model.main_input_name
    if main == "input_ids" and not any(n.startswith("decoder_") for n in accepted):
        examples = {name: _text(model, name) for name in accepted if name in TEXT}
        return examples, {name: {0: "batch_size", 1: "sequence_length"} for name in examples}
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    shape: tuple[int, ...] | None = None
    if main == "pixel_values" and size and channels:
        shape = (channels, *((size, size) if isinstance(size, int) else size))
    elif main == "input_features" and hasattr(config, "max_source_positions"):
        shape = (config.num_mel_bins, 2 * config.max_source_positions)
    if shape is None:
        raise InputError(
            f"{name} takes {main}: give example_inputs (a dict of its keyword inputs) and "
            "dynamic_shapes"
        )
    value = torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(0))
    return {main: value.to(device=model.device, dtype=model.dtype)}, {main: {0: "batch_size"}}


def _text(model: PreTrainedModel, name: str) -> Tensor:
    """Two sequences, the second padded by three tokens."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, max(4, vocabulary), (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    if name == "input_ids":
        padding = getattr(model.config, "pad_token_id", None)
        value = ids.masked_fill(mask == 0, padding if padding is not None else 0)
    else:
        value = mask if name == "attention_mask" else torch.zeros_like(ids)
    return value.to(model.device)
