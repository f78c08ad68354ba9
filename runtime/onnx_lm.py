"""An exported causal language model, run by onnxruntime behind the same interface."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.program import RegraftError, TensorSpec
from regraft.program.config import head_sizes
from regraft.runtime.causal_lm import Compiled, SessionCache
from regraft.runtime.genai import GENAI, genai_configurations
from regraft.runtime.onnx_session import OnnxSession, open_session
from regraft.runtime.recurrent import RecurrentStates, growing

MODEL = "model.onnx"
PAST, PRESENT = "past_key_values.", "present."
TABLES = (f"{PAST}cos", f"{PAST}sin")
PADDING = f"{PAST}padding"
TYPES = {
    "tensor(float)": (np.float32, torch.float32),
    "tensor(float16)": (np.float16, torch.float16),
    "tensor(uint8)": (np.uint8, torch.uint8),
    "tensor(uint16)": (np.uint16, torch.uint16),
    "tensor(int64)": (np.int64, torch.int64),
    "tensor(int32)": (np.int32, torch.int32),
}


class OnnxState:
    """The past of one generation as onnxruntime's values; sink: tokens that stay exact in front of
    quantized ones; states: those of recurrent layers."""

    def __init__(
        self, empty: dict[str, Any], sink: int = 0, states: RecurrentStates | None = None
    ) -> None:
        self.empty, self.sink, self.states = empty, sink, states
        self.reset()

    def reset(self) -> None:
        self.past: dict[str, Any] = {}
        self.length = self.batch = 0
        if self.states is not None:
            self.states.reset()

    @property
    def layers(self) -> list[str]:
        return [name for name in self.empty if name.endswith(".key")]

    @property
    def nbytes(self) -> int:
        own = sum(value.numpy().nbytes for value in self.past.values())
        return own + (self.states.nbytes if self.states is not None else 0)

    @property
    def floor(self) -> int:
        """The shortest nonzero length truncate can reach."""
        codes = (value.shape()[2] for name, value in self.past.items() if name.endswith("_codes"))
        coded = max(codes, default=0)
        padding = (x.numpy().max() for name, x in self.past.items() if name.startswith(PADDING))
        moved = max((int(count) for count in padding), default=0)
        return max(coded, moved) + self.sink if coded or moved else 0

    def feeds(self, batch: int) -> dict[str, Any]:
        """The past, of no tokens at first."""
        from onnxruntime import OrtValue

        if not self.past:
            self.batch = batch
            self.past = {
                name: OrtValue.ortvalue_from_numpy(np.zeros((batch, *shape), dtype))
                for name, (shape, dtype) in self.empty.items()
            }
        if self.states is None:
            return self.past
        states = self.states.read(batch, torch.device("cpu"))
        return self.past | {
            spec.name: OrtValue.ortvalue_from_numpy(state.numpy())
            for spec, state in zip(self.states.specs, states, strict=True)
        }

    def append(self, found: dict[str, Any], count: int) -> None:
        """Take what a step of count tokens left."""
        if self.states is not None:
            left = [found.pop(spec.name) for spec in self.states.specs]
            self.states.append([torch.from_numpy(value.numpy()) for value in left], count)
        self.past = found
        self.length += count

    def truncate(self, length: int) -> None:
        """Keep the first length tokens; only exact ones can be cut, or all of them."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of length {self.length} to {length}")
        if not length:
            return self.reset()
        if self.states is not None:
            self.states.check(length)
        if length < self.floor:
            raise ValueError(
                f"cannot truncate to {length}: tokens before {self.floor} are quantized; "
                f"truncate to at least {self.floor}, or to 0"
            )
        if self.states is not None:
            self.states.truncate(length)
        gone = self.length - length

        def cut(name: str, x: Any) -> Any:
            if name.endswith((".key", ".value")):
                return x[:, :, : x.shape[2] - gone]
            return x[:, :length] if name.startswith(TABLES) else x

        self._map(cut)
        self.length = length

    def reorder(self, index: Tensor) -> None:
        """Replace batch row i by row index[i]; index [new B]."""
        rows = index.cpu().numpy()
        self._map(lambda _, x: x[rows])
        if self.states is not None:
            self.states.reorder(index)
        self.batch = len(index)

    def _map(self, function: Any) -> None:
        from onnxruntime import OrtValue

        self.past = {
            name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(function(name, value.numpy())))
            for name, value in self.past.items()
        }


class OnnxCausalLM(Compiled):
    """What ``regraft.load`` returns for an exported folder: call it or ``generate``."""

    program: Any = None

    def __init__(self, session: Any, config: Any, generation_config: Any) -> None:
        self.session, self.config = session, config
        self.generation_config = copy.deepcopy(generation_config)
        self.device, self.name_or_path = torch.device("cpu"), ""
        self._names = {spec.name: spec for spec in session.get_inputs()}
        self._outputs = [spec.name for spec in session.get_outputs()]
        kinds = {spec.name: spec.type for spec in session.get_outputs()}
        if "input_ids" not in self._names or "logits" not in kinds:
            raise RegraftError("the model has no input_ids or no logits: not a language model")
        self.dtype = TYPES[kinds["logits"]][1]
        known = session.get_modelmeta().custom_metadata_map
        settings = json.loads(known.get("regraft_cache_settings", "[]"))
        self._sink = max((layer["sink"] for layer in settings), default=0)
        self._states = [self._spec(name) for name in json.loads(known.get("regraft_states", "[]"))]
        self._context = [int(known["regraft_context"])] if "regraft_context" in known else []
        self._run = self._steps
        self.regions = {}

    @classmethod
    def open(
        cls, path: Path, config: Any, generation_config: Any, exact: bool = False
    ) -> OnnxCausalLM:
        """RegraftError where onnxruntime refuses the file; exact: see ``open_session``."""
        return cls.of(open_session(path, exact), config, generation_config)

    @classmethod
    def of(cls, session: Any, config: Any, generation_config: Any) -> OnnxCausalLM:
        kind = type("Onnx" + (config.architectures or ["CausalLM"])[0], (cls,), {})
        return kind(session, config, generation_config)

    def __repr__(self) -> str:
        layers = sum(name.endswith(".key") for name in self._names)
        return f"{type(self).__name__}({layers} attention layers, onnxruntime)"

    def save(self, folder: Any) -> None:
        raise RegraftError("an exported model is its folder: copy that")

    def new_cache(self) -> SessionCache:
        states = [spec.name for spec in self._states]

        def shape(name: str, given: list[Any]) -> tuple[int, ...]:
            sizes = [n if isinstance(n, int) else 0 for n in given[1:]]
            if name.endswith((".key", ".value")):
                heads, size = head_sizes(self.config.get_text_config(decoder=True))
                sizes = [sizes[0] or heads or 0, sizes[1], sizes[2] or size or 0]
            return tuple(sizes)

        past = {
            name: (shape(name, spec.shape), TYPES[spec.type][0])
            for name, spec in self._names.items()
            if name.startswith(PAST) and name not in states
        }
        recurrent = RecurrentStates(self._states) if self._states else None
        return SessionCache(OnnxState(past, self._sink, recurrent))  # type: ignore[arg-type]

    def _spec(self, name: str) -> TensorSpec:
        spec = self._names[name]
        return TensorSpec(name, tuple(spec.shape), TYPES[spec.type][1], "state")

    def _served(self) -> list[int]:
        return self._context

    def _steps(
        self, ids: Tensor, mask: Tensor, positions: Tensor, keep: Tensor, state: OnnxState
    ) -> Tensor:
        """All at once; with states a few tokens after others one by one, so that each of them can
        be taken back."""
        states, length = state.states, ids.shape[1]
        if states is None or not state.length or not 1 < length <= states.rollback:
            return self._step(ids, mask, positions, keep, state)
        if growing(states.specs):
            return self._step(ids, mask, positions, keep, state)
        total = state.length
        one = torch.zeros(1, dtype=torch.long)
        logits = [
            self._step(ids[:, [i]], mask[:, : total + i + 1], positions[:, [i]], one, state)
            for i in range(length)
        ]
        return torch.cat(logits, 1)[:, keep]

    def _step(
        self, ids: Tensor, mask: Tensor, positions: Tensor, keep: Tensor, state: OnnxState
    ) -> Tensor:
        from onnxruntime import OrtValue

        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {
            name: OrtValue.ortvalue_from_numpy(x.to(torch.int64).contiguous().numpy())
            for name, x in given.items()
            if name in self._names
        }
        feeds |= state.feeds(ids.shape[0])
        try:
            results = self.session.run_with_ort_values(self._outputs, feeds)
        except Exception as error:
            raise RegraftError(f"onnxruntime: {str(error).splitlines()[0]}") from error
        found = dict(zip(self._outputs, results, strict=True))
        logits = torch.from_numpy(found.pop("logits").numpy())
        left = {name.replace(PRESENT, PAST, 1): value for name, value in found.items()}
        state.append(left, ids.shape[1])
        return logits if len(keep) == logits.shape[1] else logits[:, keep]


def configurations(folder: Path) -> tuple[Any, Any]:
    """The configuration of an exported model and of its generation."""
    from transformers import AutoConfig, GenerationConfig

    if not (folder / "config.json").is_file() and (folder / GENAI).is_file():
        return genai_configurations(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise RegraftError(
            f"{folder} has no config.json that transformers reads: an exported language model has "
            f"one beside {MODEL}"
        ) from error
    try:
        return config, GenerationConfig.from_pretrained(folder)
    except OSError:
        return config, GenerationConfig.from_model_config(config)


def load_onnx(folder: Path) -> OnnxCausalLM | OnnxSession:
    """The model of a folder with model.onnx; one with a cache is a language model, whose
    config.json and generation_config.json lie beside it."""
    session = open_session(folder / MODEL)
    if not any(value.name.startswith(PAST) for value in session.get_inputs()):
        return OnnxSession(session)
    return OnnxCausalLM.of(session, *configurations(folder))
