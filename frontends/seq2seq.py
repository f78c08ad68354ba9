"""Hugging Face encoder-decoders to three programs: encoder, cross-attention states, one step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from regraft.frontends.encoder import example_inputs
from regraft.frontends.huggingface import as_it_is, close, registered
from regraft.frontends.module import capture_module
from regraft.frontends.states import CapturedLayer
from regraft.program import CacheSpec, LayerState, Program, RegraftError

BATCH, QUERIES, PAST = 2, 3, 7


def capture_seq2seq(model: PreTrainedModel) -> tuple[Program, Program, Program]:
    """Programs of the encoder, of the cross-attention keys and values, and of a decoder step.

    encoder: the model's inputs -> last_hidden_state [batch_size, encoder_length, width].
    cross: encoder_hidden_states -> for each decoder layer cross.{i}.key and .value [batch_size,
    heads, encoder_length, head_dim].
    step: decoder_input_ids [batch_size, sequence_length], decoder_attention_mask [batch_size,
    total_sequence_length], encoder_hidden_states, encoder_attention_mask where the input is text,
    the cross states and past_key_values.{i}.key and .value -> logits and present.{i}.*.
    """
    with registered(model):
        encoder, hidden, mask = _capture_encoder(model)
        kind = encoder.metadata["out_spec"].type
        cross = _capture_cross(model, kind, hidden)
        step = _capture_step(model, kind, hidden, mask, cross(hidden))
    _check(model, encoder, cross, step)
    return encoder, cross, step


def _check(model: PreTrainedModel, encoder: Program, cross: Program, step: Program) -> None:
    """Compare a first step of the three programs with the model, on their examples."""
    inputs = dict(zip(encoder.metadata["arguments"], encoder.examples, strict=True))
    ids, *_ = step.examples
    with as_it_is(model), torch.no_grad():
        expected = model(**inputs, decoder_input_ids=ids).logits
    (hidden, *_) = encoder(*encoder.examples)
    masks = [torch.ones_like(ids), hidden, *list(inputs.values())[1:]]
    states = cross(hidden)
    (logits, *_) = step(ids, *masks, *states, *(state[:, :, :0] for state in states))
    if not close(expected, logits):
        raise RegraftError(
            f"the captured {type(model).__name__} differs from the model: a part of its attention "
            "does not follow transformers' registry; please report it"
        )


def _capture_encoder(model: PreTrainedModel) -> tuple[Program, Tensor, Tensor | None]:
    encoder = model.get_encoder()
    inputs, names = example_inputs(encoder, type(model).__name__)
    dynamic = {name: dict.fromkeys(dims, Dim.DYNAMIC) for name, dims in names.items()}
    program = capture_module(encoder, inputs, dynamic, names)
    (hidden, *_) = program(*program.examples)
    return program, hidden, inputs.get("attention_mask")


class _Stored(DynamicLayer):
    """A cache layer that holds what it is given."""

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class _Cross(nn.Module):
    def __init__(self, model: PreTrainedModel, kind: type) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, encoder_hidden_states):
        own, cross = (Cache(layer_class_to_replicate=_Stored) for _ in range(2))
        ids = torch.ones(
            encoder_hidden_states.shape[0], 1, dtype=torch.long, device=encoder_hidden_states.device
        )
        self.model(
            encoder_outputs=self.kind(last_hidden_state=encoder_hidden_states),
            decoder_input_ids=ids,
            past_key_values=EncoderDecoderCache(own, cross),
            use_cache=True,
        )
        if not cross.layers:
            raise RegraftError("its decoder keeps no cross-attention in transformers' cache")
        return [state for layer in cross.layers for state in (layer.keys, layer.values)]


class _Step(nn.Module):
    def __init__(self, model: PreTrainedModel, kind: type) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(
        self, decoder_input_ids, decoder_attention_mask, encoder_hidden_states,
        encoder_attention_mask, cross, past,
    ):  # fmt: skip
        pairs = list(zip(past[::2], past[1::2], strict=True))
        layers = [CapturedLayer(k, v) for k, v in pairs]
        kept = [_Stored() for _ in pairs]
        for layer, k, v in zip(kept, cross[::2], cross[1::2], strict=True):
            layer.update(k, v)
        cache = EncoderDecoderCache(Cache(layers=layers), Cache(layers=kept))
        cache.is_updated = dict.fromkeys(range(len(kept)), True)
        logits = self.model(
            encoder_outputs=self.kind(last_hidden_state=encoder_hidden_states),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits, *(state for layer in layers for state in (layer.keys, layer.values))


def _capture_cross(model: PreTrainedModel, kind: type, hidden: Tensor) -> Program:
    names = ({0: "batch_size", 1: "encoder_length"},)
    program = capture_module(_Cross(model, kind), (hidden,), _dynamic(names), names, wraps=model)
    specs = zip(_pairs("cross", len(program.outputs) // 2), program.outputs, strict=True)
    program.outputs = tuple(replace(spec, name=name) for name, spec in specs)
    return program


def _capture_step(
    model: PreTrainedModel,
    kind: type,
    hidden: Tensor,
    mask: Tensor | None,
    cross: tuple[Tensor, ...],
) -> Program:
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(3, max(4, size), (BATCH, QUERIES), generator=generator).to(hidden.device)
    seen = torch.ones(BATCH, PAST + QUERIES, dtype=torch.long, device=hidden.device)
    seen[0, :2] = 0
    past = [
        torch.randn(BATCH, state.shape[1], PAST, state.shape[3], generator=generator).to(state)
        for state in cross
    ]
    inputs = (ids, seen, hidden, mask, list(cross), past)
    rows = {0: "batch_size", 1: "encoder_length"}
    names = (
        {0: "batch_size", 1: "sequence_length"},
        {0: "batch_size", 1: "total_sequence_length"},
        rows,
        rows if mask is not None else None,
        [{0: "batch_size", 2: "encoder_length"}] * len(cross),
        [{0: "batch_size", 2: "past_sequence_length"}] * len(past),
    )
    program = capture_module(_Step(model, kind), inputs, _dynamic(names), names, wraps=model)
    count = len(cross) // 2
    states = [*_pairs("cross", count), *_pairs("past_key_values", count)]
    first = len(program.inputs) - len(states)
    for index, name in enumerate(states):
        role = "cache" if name.startswith("past") else "input"
        spec = replace(program.inputs[first + index], name=name, role=role)
        program.inputs = (
            *program.inputs[: first + index],
            spec,
            *program.inputs[first + index + 1 :],
        )
    outputs = zip(_pairs("present", count), program.outputs[1:], strict=True)
    program.outputs = (
        replace(program.outputs[0], name="logits", role="logits"),
        *(replace(spec, name=name, role="cache") for name, spec in outputs),
    )
    program.cache = CacheSpec((LayerState(),) * count)
    return program


def _dynamic(names: Any) -> Any:
    if isinstance(names, dict):
        return dict.fromkeys(names, Dim.DYNAMIC)
    return None if names is None else type(names)(_dynamic(name) for name in names)


def _pairs(name: str, count: int) -> list[str]:
    return [f"{name}.{i}.{kind}" for i in range(count) for kind in ("key", "value")]
