"""What a causal language model carries from token to token, found by running it.

After a call the model's cache is an object with tensors in it: keys and values of attention
layers, and states of constant size (convolutions, state spaces, linear attention). A Memory
remembers that object; ``give`` makes a copy that holds other tensors, symbolic ones for capture,
and ``take`` reads the tensors back after the model has run. Nothing of it knows an architecture.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from regraft.program import RegraftError

Path = tuple[Any, ...]


class CapturedLayer(DynamicLayer):
    """A cache layer that leaves one ``regraft::kv_update`` for keys and one for values."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys = torch.ops.regraft.kv_update(self.keys, key_states)
        self.values = torch.ops.regraft.kv_update(self.values, value_states)
        return self.keys, self.values

    is_sliding = False
    get_mask_sizes = DynamicLayer.get_mask_sizes
    get_seq_length = DynamicLayer.get_seq_length
    get_max_length = DynamicLayer.get_max_length


@functools.cache
def _captured_class(base: type[DynamicLayer]) -> type[CapturedLayer]:
    """CapturedLayer with what else the class of layer keeps, under no layer type of its own."""
    return type(f"Captured{base.__name__}", (CapturedLayer, base), {"_layer_type": None})


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether transformers gives any layer of this model more than keys and values."""
    plain = {DynamicLayer, DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", None)}
    return any(type(layer) not in plain for layer in DynamicCache(config=model.config).layers)


class Memory:
    """The cache of a model: the argument that takes it, its structure and where its states are.

    keys: (index of the layer, its keys, its values) of each attention layer, from a trial call;
    states: (name, shape, dtype) of every other tensor that is not a constant; the shape has
    "batch_size" where the rows are and "past_sequence_length" where tokens are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.argument, self._passed = model, "", False
        before = _held(model)
        small, self.template = self._run(2, 3), self._run(3, 5)
        self._original = {key: before.get(key) for key in self.template[1]}
        cache = self.template[0]
        self.keys: list[tuple[int, Any, Any]] = [
            (index, layer.keys, layer.values)
            for index, layer in enumerate(getattr(cache, "layers", ()))
            if isinstance(layer, DynamicLayer) and layer.keys is not None
        ]
        attention = {id(t) for _, *pair in self.keys for t in pair}
        earlier = dict(_leaves(small))
        self.states: list[tuple[str, tuple[int | str, ...], torch.dtype]] = []
        self._paths: list[Path] = []
        for path, tensor in _leaves(self.template):
            if id(tensor) in attention:
                continue
            shape = self._shape(path, earlier[path].shape, tensor.shape)
            if not all(isinstance(n, int) for n in shape) or not torch.equal(tensor, earlier[path]):
                self._paths.append(path)
                self.states.append((_name(path), shape, tensor.dtype))

    def _run(self, rows: int, length: int) -> list[Any]:
        """The cache that a call leaves behind, and the tensors that it leaves on modules."""
        accepted = inspect.signature(self.model.forward).parameters
        given = {self.argument: DynamicCache(config=self.model.config)} if self._passed else {}
        before = _held(self.model)
        ids = torch.ones(rows, length, dtype=torch.long, device=self.model.device)
        output = self.model(input_ids=ids, use_cache=True, **given)
        left = [name for name in output if name in accepted]
        if not left and not given and "past_key_values" in accepted:
            self.argument, self._passed = "past_key_values", True
            return self._run(rows, length)
        if left:
            self.argument = left[0]
        held = {key: t for key, t in _held(self.model).items() if before.get(key) is not t}
        return [output[left[0]] if left else given.get(self.argument), held]

    def restore(self) -> None:
        """Give the model's modules back what they held before."""
        for key, value in self._original.items():
            _hold(self.model, key, value)

    def _shape(self, path: Path, small: torch.Size, large: torch.Size) -> tuple[int | str, ...]:
        names = {(2, 3): "batch_size", (3, 5): "past_sequence_length"}
        pairs = list(zip(small, large, strict=True))
        if any(a != b and (a, b) not in names for a, b in pairs):
            raise RegraftError(
                f"{type(self.model).__name__} keeps a state {_name(path)} whose shape "
                f"{list(small)} for 2 rows of 3 tokens is {list(large)} for 3 of 5: it cannot be "
                "compiled yet"
            )
        return tuple(names.get(pair, pair[1]) for pair in pairs)

    def zeros(self, rows: int) -> list[Tensor]:
        """Empty keys and values, and states before the first token."""
        device = self.model.device
        sizes: dict[Any, Any] = {"batch_size": rows, "past_sequence_length": 0}
        pairs = [t[:1, :, :0].expand(rows, -1, -1, -1) for _, *pair in self.keys for t in pair]
        states = [
            torch.zeros([sizes.get(size, size) for size in shape], dtype=dtype, device=device)
            for _, shape, dtype in self.states
        ]
        return pairs + states

    def give(self, tensors: Sequence[Tensor]) -> list[Any]:
        """A copy of the cache that holds these keys, values and states."""
        found = dict(_leaves(self.template))
        old = [t for _, *pair in self.keys for t in pair] + [found[p] for p in self._paths]
        count = 2 * len(self.keys)
        fresh = [*tensors[:count], *(t.clone() for t in tensors[count:])]
        memo: dict[int, Any] = {id(tensor): tensor for tensor in found.values()}
        memo.update((id(a), b) for a, b in zip(old, fresh, strict=True))
        cache, held = copy.deepcopy(self.template, memo)
        for index, *_ in self.keys:
            cache.layers[index] = _captured(cache.layers[index])
        for key, tensor in held.items():
            _hold(self.model, key, tensor)
        return [cache, held]

    def row(self, states: Sequence[Tensor], index: int) -> list[Tensor]:
        """The states of one row; there are no keys and values."""
        return [
            state.narrow(shape.index("batch_size"), index, 1) if "batch_size" in shape else state
            for state, (_, shape, _) in zip(states, self.states, strict=True)
        ]

    def join(self, rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The states of all rows, given those of each row for each state."""
        return [
            torch.cat(list(parts), shape.index("batch_size")) if "batch_size" in shape else parts[0]
            for parts, (_, shape, _) in zip(rows, self.states, strict=True)
        ]

    def arguments(self, given: list[Any]) -> dict[str, Any]:
        return {self.argument: given[0]} if self.argument else {}

    def take(self, given: list[Any], output: Any) -> list[Tensor]:
        """The keys, values and states after a call, in the order that ``give`` takes."""
        cache = output.get(self.argument)
        cache = given[0] if cache is None else cache
        layers = [cache.layers[index] for index, *_ in self.keys]
        now = _held(self.model)
        found = dict(_leaves([cache, {key: now[key] for key in given[1]}]))
        pairs = [t for layer in layers for t in (layer.keys, layer.values)]
        return pairs + [found[path] for path in self._paths]


def _captured(layer: DynamicLayer) -> CapturedLayer:
    captured = object.__new__(_captured_class(type(layer)))
    captured.__dict__.update(layer.__dict__)
    return captured


def _held(model: torch.nn.Module) -> dict[tuple[str, str], Tensor]:
    """Tensors that are plain attributes of modules: neither parameters nor buffers."""
    return {
        (name, attribute): value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if torch.is_tensor(value)
    }


def _hold(model: torch.nn.Module, key: tuple[str, str], value: Tensor | None) -> None:
    setattr(model.get_submodule(key[0]), key[1], value)


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor inside dictionaries, sequences and the objects of a cache."""
    if torch.is_tensor(value):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    elif hasattr(value, "__dict__") and not isinstance(value, (torch.nn.Module, PreTrainedConfig)):
        yield from _leaves(vars(value), path)


def _name(path: Path) -> str:
    """(0, "layers", 3, "conv_states", 0) -> "3.conv_state"; a tensor that a module holds keeps its
    path."""
    parts = [str(p) for part in path[1:] for p in (part if isinstance(part, tuple) else (part,))]
    parts = [part[:-1] if part.endswith("_states") else part for part in parts]
    parts = parts[1:] if parts[0] == "layers" else parts
    return ".".join(parts[:-1] if parts[-1] == "0" and len(parts) > 2 else parts)
