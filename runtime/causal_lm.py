"""A compiled causal language model with the interface of the model it came from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from regraft.program import Program, RegraftError, Report
from regraft.runtime.artefact import save
from regraft.runtime.cache import CacheState
from regraft.runtime.cuda_graph import DecodeGraph
from regraft.runtime.lower import new_cache
from regraft.runtime.steps import Steps


class SessionCache(Cache):
    """transformers' view of a CacheState: it can be cropped and reordered.

    With recurrent states only the last few steps can be taken back, so it does not call itself
    croppable.
    """

    is_compileable = False

    def __init__(self, state: CacheState) -> None:
        super().__init__(layers=[])
        self.state = state

    @property
    def is_croppable(self) -> bool:
        return self.state.states is None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.state.length

    def get_max_length(self, layer_idx: int | None = 0) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Keep the first n tokens (n >= 0) or drop the last -n (n < 0)."""
        length = self.state.length
        keep = tokens_to_remove if tokens_to_remove >= 0 else length + tokens_to_remove
        self.state.truncate(min(keep, length))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state.reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state.length:
            rows = self.state.batch
            self.state.reorder(torch.arange(rows).repeat_interleave(repeats))

    def reset(self) -> None:
        self.state.reset()

    @property
    def nbytes(self) -> int:
        return self.state.nbytes

    def __len__(self) -> int:
        return len(self.state.layers)


class Compiled(GenerationMixin):
    """What ``regraft.compile`` returns: call it or ``generate`` as with the original model.

    program: the transformed graph; report: what each pass did; config: the model's own.
    """

    main_input_name = "input_ids"
    base_model_prefix = "model"
    _is_stateful = False
    _supports_cache_class = True
    _graph: DecodeGraph | None = None

    def __init__(self, program: Program, report: Report, model: Any) -> None:
        self.program, self.report = program, report
        self.config: PretrainedConfig = model.config
        self.generation_config = copy.deepcopy(model.generation_config)
        self.device, self.dtype = model.device, model.dtype
        self.name_or_path = getattr(model, "name_or_path", "")
        self._run = Steps(program)
        self.regions, self._graph = self._run.regions, self._run.graph

    def __repr__(self) -> str:
        formats = sorted({layer.format for layer in self.program.cache.layers})
        return (
            f"Compiled({type(self).__name__}, {len(self.program.cache.layers)} attention layers, "
            f"{len(self.program.graph.nodes)} nodes, cache: {'+'.join(formats)})"
        )

    def save(self, folder: str | Path) -> None:
        """Write an artefact that ``regraft.load`` reads: weights, graph, compiled regions."""
        save(self, folder)

    def export_onnx(
        self,
        folder: str | Path,
        *,
        opset: int = 21,
        functions: bool = True,
        contrib: bool = False,
        tokenizer: Any = None,
        force: bool = False,
    ) -> Any:
        """Write one model.onnx for prefill, decode and verification, its weights beside it, and
        the settings of transformers and onnxruntime-genai; the tokenizer's files too, if given.

        ``regraft::`` operators become functions of domain ai.regraft in standard operators, or
        with functions=False those operators themselves. With contrib the file uses onnxruntime's
        own fused operators where they fit, and runs on onnxruntime alone, where a batch then
        goes on by one token at a time. Packed weights stay packed, as blocks of DequantizeLinear
        (opset 21 or later) or, with contrib, of MatMulNBits; onnxruntime rounds the activations
        that meet them to 8 bits. What onnxruntime computes is compared with this program
        first: returns the sizes and errors. RegraftError where an operator has no ONNX form, where
        the comparison fails, and where the folder exists, unless force.
        """
        from regraft.frontends.export import export

        return export(
            *(self, folder),
            opset=opset,
            functions=functions,
            contrib=contrib,
            tokenizer=tokenizer,
            force=force,
        )

    def new_cache(self) -> SessionCache:
        return SessionCache(new_cache(self.program.cache))

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SessionCache | None = None,
        use_cache: bool = True,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool = True,
        **ignored: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """input_ids [batch, length] -> logits [batch, length or kept, vocab] and the cache.

        attention_mask [batch, past + length] marks padding with 0; positions follow from it.
        """
        extra = sorted(k for k, v in ignored.items() if v is not None and k not in _HARMLESS)
        if extra:
            raise RegraftError(f"unknown input {', '.join(extra)}: this model takes input_ids, "
                               "attention_mask, position_ids and past_key_values")  # fmt: skip
        cache = self.new_cache() if past_key_values is None else past_key_values
        if not isinstance(cache, SessionCache):
            raise RegraftError(
                f"past_key_values is a {type(cache).__name__}: pass the cache that this model "
                "returned, or None"
            )
        past = cache.state.length
        self._check(input_ids, attention_mask, past)
        for name, x in (("attention_mask", attention_mask), ("position_ids", position_ids)):
            if x is not None and x.device != self.device:
                raise RegraftError(f"{name} is on {x.device}, the model on {self.device}")
        keep = logits_to_keep
        unpadded = attention_mask is None and position_ids is None and not torch.is_tensor(keep)
        if unpadded and self._graph is not None and self._graph.takes(input_ids, cache.state):
            logits = self._graph(input_ids, None, cache.state)
        else:
            batch, length = input_ids.shape
            if attention_mask is None:
                attention_mask = input_ids.new_ones(batch, past + length)
            if position_ids is None:
                position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
            if not torch.is_tensor(keep):
                first = max(0, length - keep) if keep else 0
                keep = torch.arange(first, length, device=input_ids.device)
            logits = self._run(input_ids, attention_mask, position_ids, keep, cache.state)
        output = CausalLMOutputWithPast(logits=logits, past_key_values=cache if use_cache else None)
        return output if return_dict else output.to_tuple()

    __call__ = forward

    def _check(self, ids: Tensor, mask: Tensor | None, past: int) -> None:
        if (
            not torch.is_tensor(ids)
            or ids.dim() != 2
            or ids.dtype not in (torch.int64, torch.int32)
        ):
            shape = getattr(ids, "dtype", type(ids).__name__), getattr(ids, "ndim", "no")
            raise RegraftError(
                f"input_ids must be an integer tensor [batch, length], got {shape[0]} of "
                f"{shape[1]} dimensions; a tokenizer with padding=True makes one"
            )
        if not ids.numel():
            raise RegraftError("input_ids is empty: a prompt needs at least one token")
        if ids.device != self.device:
            raise RegraftError(f"input_ids is on {ids.device}, the model on {self.device}")
        total = past + ids.shape[1]
        if mask is not None and tuple(mask.shape) != (ids.shape[0], total):
            raise RegraftError(
                f"attention_mask must be [batch, past + length] = [{ids.shape[0]}, {total}], "
                f"got {list(mask.shape)}"
            )
        limit = getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit and total > limit:
            raise RegraftError(f"{total} tokens are beyond the model's limit of {limit}")
        served = self._served()
        if served and total > min(served):
            raise RegraftError(
                f"{total} tokens are beyond the {min(served)} that the captured graph serves: the "
                "model's own code turns elsewhere for longer contexts"
            )

    def _served(self) -> list[int]:
        """The longest contexts of the captured graphs, where they have one."""
        return [p.context for p in self.program.parts.values() if p.context is not None]

    def can_generate(self) -> bool:
        return True

    def eval(self) -> Compiled:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Compiled:
        """Itself; RegraftError when asked for another device or dtype than it was compiled for."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == self.device.type:
            device = self.device if device.index is None else device
        if device not in (None, self.device) or dtype not in (None, self.dtype):
            raise RegraftError(
                f"the model was compiled for {self.device} and {self.dtype}: move the original "
                "and compile it again"
            )
        return self

    def get_experts_implementation(self) -> dict[str, str]:
        return {}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.new_cache()

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        """The tokens that the cache has not seen, and what forward takes."""
        past = past_key_values.state.length if past_key_values is not None else 0
        names = ("attention_mask", "logits_to_keep", "use_cache")
        inputs = {name: kwargs[name] for name in names if name in kwargs}
        return {"input_ids": input_ids[:, past:], "past_key_values": past_key_values, **inputs}


_HARMLESS = {"cache_position", "output_attentions", "output_hidden_states", "next_sequence_length"}
