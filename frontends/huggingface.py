"""Hugging Face causal language models to a Program, through their own registries.

The model runs once on symbolic shapes with our attention function, our mask function and our
cache layers registered; nothing is patched and no architecture is special.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import causal_mask_function, sdpa_mask

from regraft.frontends.guards import longest_context
from regraft.frontends.opaque import around_data
from regraft.frontends.recurrent import Trial, capture_recurrent
from regraft.frontends.states import CapturedLayer, is_recurrent
from regraft.frontends.tracing import trace
from regraft.frontends.trial import agree
from regraft.kernels import ops  # noqa: F401  registers the regraft:: operators
from regraft.program import CacheSpec, LayerState, Program, RegraftError, TensorSpec
from regraft.program.program import tracing

BATCH, QUERIES, PAST = 2, 3, 7


def _attention(module, q, k, v, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    softcap = kwargs.get("softcap") or 0.0
    sinks = kwargs.get("s_aux", kwargs.get("sinks"))
    mask, bias = attention_mask, kwargs.get("position_bias")
    if bias is not None:
        mask = bias if mask is None else _biased(mask, bias)
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    out = torch.ops.regraft.attention(
        q, k, v, mask, sinks, float(scale), float(softcap), causal=bool(causal) or mask is not None
    )
    return out.transpose(1, 2).contiguous(), None


def _biased(mask: Tensor, bias: Tensor) -> Tensor:
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else mask + bias


def _trial(mode: Any):
    """Forget the sizes that a failed evaluation on fake tensors leaves behind."""
    if not isinstance(mode, FakeTensorMode) or mode.shape_env is None:
        return nullcontext()
    return mode.shape_env.ignore_fresh_unbacked_symbols()


def _window_of(mask_function, local_size) -> int | None:
    """0 for a causal mask, its size for a sliding window, None for any other mask."""
    if mask_function is causal_mask_function:
        return 0
    with unset_fake_temporarily() as mode, disable_proxy_modes_tracing(), _trial(mode):
        try:
            size = int(local_size or 0)
            query = torch.tensor(4 * size + 9)
            zero = torch.tensor(0)
            edges = [1, 0, -1, 1 - size, -size, -size - 1]
            seen = [bool(mask_function(zero, zero, query, query + edge)) for edge in edges]
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None
    expected = [edge <= 0 and (size == 0 or edge > -size) for edge in edges]
    return size if seen == expected else None


def _mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, **kwargs):
    window = _window_of(kwargs.get("mask_function", causal_mask_function), kwargs.get("local_size"))
    plain = isinstance(kv_offset, int) and kv_offset == 0 and not torch.is_tensor(q_offset)
    if window is None or not plain:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset,
            **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
        )  # fmt: skip
    return torch.ops.regraft.causal_mask(
        kwargs.get("attention_mask"), q_length, kv_length, q_offset, window, batch_size
    )


AttentionInterface.register("regraft", _attention)
AttentionMaskInterface.register("regraft", _mask)


class _Step(torch.nn.Module):
    """One call of the model as a function of ids, mask, positions and past keys and values."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self.keeps, self.places = "logits_to_keep" in accepted, "position_ids" in accepted

    def forward(self, input_ids, attention_mask, position_ids, logits_to_keep, *past):
        layers = [CapturedLayer(k, v) for k, v in zip(past[::2], past[1::2], strict=True)]
        extra = {"logits_to_keep": logits_to_keep} if self.keeps else {}
        if self.places:
            extra["position_ids"] = position_ids
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=Cache(layers=layers),
            use_cache=True,
            **extra,
        )
        logits = output.logits if self.keeps else output.logits[:, logits_to_keep]
        return logits, *(state for layer in layers for state in (layer.keys, layer.values))


class _Probe(DynamicLayer):
    """Learns the shapes of a layer's keys and values."""

    def update(self, key_states, value_states, *args, **kwargs):
        self.sample = (key_states, value_states)
        return super().update(key_states, value_states, *args, **kwargs)


def _state_shapes(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    layers: list = [_Probe() for _ in range(count)]
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    mask = torch.ones_like(ids)
    cache = Cache(layers=layers)
    try:
        model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    except AttributeError as error:
        raise RegraftError(
            f"{type(model).__name__} keeps a cache of its own kind: {error}"
        ) from error
    used = [hasattr(layer, "sample") for layer in layers]
    if not any(used):
        return []
    last = max(i for i, use in enumerate(used) if use)
    if not all(used[: last + 1]):
        raise RegraftError(
            f"{type(model).__name__} keeps no keys for layer {used.index(False)}: give it a "
            "configuration whose layer_types say so"
        )
    return [layer.sample for layer in layers[: last + 1]]


@contextmanager
def registered(model: PreTrainedModel):
    """Run the model with our attention, where it takes one; give its own back afterwards."""
    configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    before = [config._attn_implementation for config in configs]
    experts = model.get_experts_implementation()
    was_training = model.training
    model.eval()
    try:
        try:
            if model._can_set_attn_implementation():
                model.set_attn_implementation("regraft")
            if experts:
                model.set_experts_implementation("batched_mm")
        except ValueError as error:
            raise RegraftError(
                f"{type(model).__name__} cannot use registered attention: {error}"
            ) from error
        yield
    finally:
        model.train(was_training)
        if experts:
            model.set_experts_implementation(experts)
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


@contextmanager
def as_it_is(model: PreTrainedModel):
    """The model in evaluation mode, with its own attention."""
    was_training = model.training
    try:
        yield model.eval()
    finally:
        model.train(was_training)


def close(wanted: Tensor, found: Tensor) -> bool:
    """Equal up to 64 roundings of the largest output."""
    limit = 64 * torch.finfo(wanted.dtype).eps if wanted.is_floating_point() else 0.0
    scale = wanted.float().abs().max().item()
    return bool((wanted.float() - found.float()).abs().max().item() <= limit * max(scale, 1e-6))


def capture(model: PreTrainedModel) -> Program:
    """Program of one step: prefill, decode and verification are the same graph, except for
    models with recurrent layers (see ``capture_recurrent``).

    Inputs: input_ids [batch_size, sequence_length], attention_mask [batch_size,
    total_sequence_length], position_ids, logits_to_keep [kept], and per layer
    past_key_values.{i}.key and .value [batch_size, heads, past_sequence_length, head_dim].
    Outputs: logits [batch_size, kept, vocab] and present.{i}.key and .value.
    """
    with tracing:
        return around_data(model, lambda: _capture(model))


def _capture(model: PreTrainedModel) -> Program:
    with torch.no_grad():
        if not is_recurrent(model):
            with registered(model):
                if shapes := _state_shapes(model):
                    return _capture_attention(model, shapes)
        trial = Trial(model)
        with registered(model):
            return capture_recurrent(model, trial)


def _capture_attention(model: PreTrainedModel, shapes: list[tuple[Tensor, Tensor]]) -> Program:
    limit = model.config.get_text_config(decoder=True).vocab_size
    program = decoder(_Step(model), *signature(limit, shapes, model.device), model.dtype)
    agree(model, program)
    return program


def decoder(
    step: torch.nn.Module,
    inputs: list[TensorSpec],
    examples: list[Tensor],
    dynamic: list[tuple[int, ...]],
    dtype: torch.dtype,
) -> Program:
    """The program of step.forward(*examples), which gives logits of dtype and present states."""
    module, names, fakes = trace(step, inputs, examples, dynamic)
    outputs = [TensorSpec("logits", ("batch_size", "kept", "vocab"), dtype, "logits")]
    for spec in inputs[4:]:
        name = spec.name.replace("past_key_values", "present")
        shape = (*spec.shape[:2], "total_sequence_length", spec.shape[3])
        outputs.append(TensorSpec(name, shape, spec.dtype, "cache"))
    layers = tuple(LayerState() for _ in inputs[4::2])
    return Program(
        module, tuple(inputs), tuple(outputs), CacheSpec(layers), tuple(examples),
        {"parameters": names}, context=longest_context(inputs, fakes),
    )  # fmt: skip


def signature(
    limit: int, states: Sequence[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[list[TensorSpec], list[Tensor], list[tuple[int, ...]]]:
    """Inputs of a decoder, examples of them, and the dimensions of any size.

    limit: ids lie below it; states [B, heads, T, head_dim]: keys and values of each layer.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, max(4, limit), (BATCH, QUERIES), generator=generator).to(device)
    mask = torch.ones(BATCH, PAST + QUERIES, dtype=torch.long, device=device)
    mask[0, :4] = 0
    positions = torch.arange(PAST, PAST + QUERIES, device=device).repeat(BATCH, 1)
    positions[0] -= 4
    keep = torch.arange(QUERIES, device=device)
    rows = ("batch_size", "sequence_length")
    inputs = [
        TensorSpec("input_ids", rows, torch.long, "ids"),
        TensorSpec("attention_mask", ("batch_size", "total_sequence_length"), torch.long, "mask"),
        TensorSpec("position_ids", rows, torch.long, "positions"),
        TensorSpec("logits_to_keep", ("kept",), torch.long, "positions"),
    ]
    examples = [ids, mask, positions, keep]
    dynamic = [(0, 1), (0, 1), (0, 1), (0,)]
    for i, pair in enumerate(states):
        for kind, state in zip(("key", "value"), pair, strict=True):
            shape = (BATCH, state.shape[1], PAST, state.shape[3])
            past = torch.randn(shape, generator=generator).to(device=device, dtype=state.dtype)
            dims = ("batch_size", shape[1], "past_sequence_length", shape[3])
            inputs.append(TensorSpec(f"past_key_values.{i}.{kind}", dims, state.dtype, "cache"))
            examples.append(past)
            dynamic.append((0, 2))
    return inputs, examples, dynamic
