"""A compiled encoder-decoder with the interface of the model it came from."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import Seq2SeqLMOutput

from regraft.program import Program, RegraftError, Report
from regraft.runtime.cache import CacheState
from regraft.runtime.causal_lm import Compiled, SessionCache
from regraft.runtime.lower import lower, lower_stateless, new_cache
from regraft.runtime.module import CompiledModule, check_inputs


class Seq2SeqCache(SessionCache):
    """The decoder's own cache, and the cross-attention keys and values of the encoded input.

    cross: per decoder layer a key and a value [batch, heads, encoder_length, head_dim], made by
    the first step.
    """

    def __init__(self, state: CacheState) -> None:
        super().__init__(state)
        self.cross: list[Tensor] = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.cross = [state.index_select(0, beam_idx) for state in self.cross]

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.cross = [state.repeat_interleave(repeats, 0) for state in self.cross]

    def reset(self) -> None:
        super().reset()
        self.cross = []

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(state.nbytes for state in self.cross)


class CompiledHalf(CompiledModule):
    """The encoder: token ids [batch, length] or features -> the model's own encoder output."""

    def __init__(self, program: Program, report: Report, main_input_name: str) -> None:
        super().__init__(program, report)
        self.main_input_name = main_input_name

    def forward(
        self, inputs: Tensor | None = None, attention_mask: Tensor | None = None, **named: Any
    ) -> Any:
        inputs = named.pop(self.main_input_name, inputs)
        if torch.is_tensor(inputs) and not inputs.numel():
            raise RegraftError(f"{self.main_input_name} is empty")
        given = {self.main_input_name: inputs}
        if "attention_mask" in self.program.metadata["arguments"]:
            whole = torch.is_tensor(inputs) and attention_mask is None
            given["attention_mask"] = torch.ones_like(inputs) if whole else attention_mask
        return super().__call__(**given)

    __call__ = forward


class CompiledSeq2Seq(GenerationMixin):
    """What ``regraft.compile`` returns for an encoder-decoder: call it or ``generate``.

    program: one decoder step; encoder: its own compiled object; cross: the program of the
    cross-attention states; report: what each pass did to the three; config: the model's own.
    """

    base_model_prefix = "model"
    input_modalities = ("text",)
    _is_stateful = False
    _supports_cache_class = True

    def __init__(self, encoder: Program, cross: Program, step: Program, report: Report, model: Any):
        self.encoder = CompiledHalf(encoder, report, model.get_encoder().main_input_name)
        self.cross, self.program, self.report = cross, step, report
        self.config: PretrainedConfig = model.config
        self.generation_config = copy.deepcopy(model.generation_config)
        self.device, self.dtype = model.device, model.dtype
        self.main_input_name = model.main_input_name
        self.name_or_path = getattr(model, "name_or_path", "")
        if generation_class(model) is not GenerationMixin:
            with torch.device("meta"):  # what the model's own generate asks of its modules
                setattr(self, model.base_model_prefix, type(model)(model.config).base_model)
        self._cross, _ = lower_stateless(cross)
        self._step, self.regions = lower(step)
        self._masked = any(spec.name == "encoder_attention_mask" for spec in step.inputs)

    def __repr__(self) -> str:
        formats = sorted({layer.format for layer in self.program.cache.layers})
        return (
            f"CompiledSeq2Seq({type(self).__name__}, {len(self.program.cache.layers)} decoder "
            f"layers, {len(self.program.graph.nodes)} nodes a step, cache: {'+'.join(formats)})"
        )

    def new_cache(self) -> Seq2SeqCache:
        return Seq2SeqCache(new_cache(self.program.cache))

    def get_encoder(self) -> CompiledHalf:
        return self.encoder

    @torch.no_grad()
    def forward(
        self,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Seq2SeqCache | None = None,
        use_cache: bool = True,
        return_dict: bool = True,
        **named: Any,
    ) -> Seq2SeqLMOutput | tuple:
        """Encoder inputs and decoder_input_ids [batch, length] -> logits [batch, length, vocab].

        ``inputs`` may be given by its own name (input_ids, input_features). Masks mark padding
        with 0: attention_mask [batch, encoder length], decoder_attention_mask [batch, past +
        length]. encoder_outputs replaces the encoder's run; a cache that has seen the input
        replaces both.
        """
        inputs = named.pop(self.main_input_name, inputs)
        if extra := sorted(k for k, v in named.items() if v is not None and k not in _HARMLESS):
            raise RegraftError(
                f"unknown input {', '.join(extra)}: this model takes {self.main_input_name}, "
                "attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs and "
                "past_key_values"
            )
        cache = self.new_cache() if past_key_values is None else past_key_values
        if not isinstance(cache, Seq2SeqCache):
            raise RegraftError(
                f"past_key_values is a {type(cache).__name__}: pass the cache that this model "
                "returned, or None"
            )
        if encoder_outputs is None:
            if inputs is None:
                raise RegraftError(f"{self.main_input_name} or encoder_outputs is missing")
            encoder_outputs = self.encoder(inputs, attention_mask)
        hidden = encoder_outputs[0]
        if not cache.cross:
            check_inputs(self.cross, [hidden], self.device)
            cache.cross = list(self._cross(hidden))
        self._check(decoder_input_ids, hidden, cache.state.length)
        ids, rows = decoder_input_ids, hidden.shape[:2]
        seen = ids.new_ones(ids.shape[0], cache.state.length + ids.shape[1])
        masks = [_checked("decoder_attention_mask", decoder_attention_mask, seen), hidden]
        if self._masked:
            masks.append(_checked("attention_mask", attention_mask, ids.new_ones(rows)))
        logits = self._step(ids, *masks, *cache.cross, cache.state)
        output = Seq2SeqLMOutput(
            logits=logits,
            past_key_values=cache if use_cache else None,
            encoder_last_hidden_state=hidden,
        )
        return output if return_dict else output.to_tuple()

    __call__ = forward

    def _check(self, ids: Any, hidden: Tensor, past: int) -> None:
        if not torch.is_tensor(ids) or ids.dim() != 2 or ids.dtype != torch.int64:
            raise RegraftError("decoder_input_ids must be an int64 tensor [batch, length]")
        if not ids.numel():
            raise RegraftError("decoder_input_ids is empty: the decoder needs a start token")
        if ids.shape[0] != hidden.shape[0]:
            raise RegraftError(
                f"decoder_input_ids has {ids.shape[0]} rows, the encoded input {hidden.shape[0]}"
            )
        names = ("max_target_positions", "max_position_embeddings")
        limit = next((getattr(self.config, n) for n in names if hasattr(self.config, n)), None)
        if limit and past + ids.shape[1] > limit:
            raise RegraftError(
                f"{past + ids.shape[1]} tokens are beyond the decoder's limit of {limit}"
            )

    save = CompiledModule.save

    def can_generate(self) -> bool:
        return True

    def export_onnx(self, folder: Any, **settings: Any) -> None:
        raise RegraftError(
            f"{type(self).__name__} cannot be exported yet: an encoder-decoder's encoder alone can "
            "(encoder.export_onnx)"
        )

    def eval(self) -> CompiledSeq2Seq:
        return self

    to: Any = Compiled.to
    get_experts_implementation: Any = Compiled.get_experts_implementation
    _prepare_cache_for_generation: Any = Compiled._prepare_cache_for_generation

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        """The tokens that the cache has not seen, and what forward takes."""
        past = past_key_values.state.length if past_key_values is not None else 0
        names = ("attention_mask", "decoder_attention_mask", "encoder_outputs", "use_cache")
        inputs = {name: kwargs[name] for name in names if name in kwargs}
        inputs["decoder_input_ids"] = input_ids[:, past:]
        return {"past_key_values": past_key_values, **inputs}


def _checked(name: str, mask: Tensor | None, ones: Tensor) -> Tensor:
    if mask is not None and mask.shape != ones.shape:
        raise RegraftError(f"{name} must be {list(ones.shape)}, got {list(mask.shape)}")
    return ones if mask is None else mask


_HARMLESS = {"cache_position", "output_attentions", "output_hidden_states", "next_sequence_length"}


def generation_class(model: Any) -> type:
    """The class that gives the model its ``generate``, weights aside."""
    return next(
        kind
        for kind in type(model).__mro__
        if issubclass(kind, GenerationMixin) and not issubclass(kind, torch.nn.Module)
    )
