"""GGUF files of causal language models: transformers' model around weights not yet read."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.program import Program, RegraftError
from regraft.program.folders import cache_dir, written_whole


@dataclass(frozen=True)
class GgufModel:
    """model: transformers' own. kept: {parameter: the GgufTensor that it stands for}; these
    parameters are placeholders, random, of almost no memory. notes: (tensor, why) of others.
    digest: of all that the file holds before its weights."""

    model: Any
    kept: dict[str, Any]
    notes: tuple[tuple[str, str], ...]
    digest: str

    def packed(self, names: list[str]) -> Tensor:
        """The packed weights of the file's tensors of these names, one after the other."""
        from regraft.kernels.linear.gguf_file import packed_together

        known = {tensor.name: tensor for tensor in self.kept.values()}
        return packed_together([known[name] for name in names])[0]

    def attach(self, program: Program) -> None:
        """Tell the program which of its tensors stand for which of the file's."""
        known = {id(p): name for name, p in self.model.named_parameters()}
        for part in program.parts.values():
            found = {}
            for node in part.graph.find_nodes(op="get_attr"):
                name = known.get(id(getattr(part.graph_module, str(node.target))))
                if name in self.kept:
                    found[str(node.target)] = self.kept[name]
            part.metadata["gguf"], part.metadata["gguf dense"] = found, self.notes


def give_back() -> None:
    """Return freed memory to the system, where the C library keeps it: capture leaves much."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def load_gguf(path: Path) -> GgufModel:
    """The model of a GGUF file, its packed weights not yet read."""
    try:
        import accelerate  # noqa: F401  what transformers' models of no memory need
        import gguf  # noqa: F401
    except ImportError as error:
        raise RegraftError(f"{path} needs {error.name}: pip install 'regraft[gguf]'") from error
    from regraft.kernels.linear.gguf_file import GgufFile

    file = GgufFile(path)
    model = _model(file)
    names = _names(file, model)
    process = _processor(file, model, names)
    kept: dict[str, Any] = {}
    notes: list[tuple[str, str]] = []
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for tensor in file.tensors.values():
        name = names.get(tensor.name, "")
        if name not in shapes:
            continue
        order = _order(tensor, process) if tensor.format else None
        if order is not None and shapes[name] == tensor.shape:
            same = torch.equal(order, torch.arange(len(order)))
            kept[name] = tensor.ordered(None if same else order)
            _put(model, name, _placeholder(*tensor.shape))
            continue
        if len(tensor.shape) > 1:
            notes.append((tensor.name, f"{tensor.kind} is kept as floats"))
        _put(model, name, _dense(tensor, process, shapes[name]))
    model.tie_weights()
    if missing := [name for name, p in model.named_parameters() if p.is_meta]:
        raise RegraftError(f"{path} holds no weights for {missing[0]} ({len(missing)} are missing)")
    return GgufModel(model.eval(), kept, tuple(notes), file.digest)


def _model(file: Any) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = _config(file)
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with init_empty_weights(), torch.no_grad():
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RegraftError(f"{file.path} describes no model that is known: {error}") from error


def _config(file: Any) -> dict[str, Any]:
    """The configuration that transformers reads from the file, kept for next time."""
    kept = cache_dir() / "gguf" / f"{file.digest}.json"
    try:
        return json.loads(kept.read_text())
    except (OSError, ValueError):
        pass
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        found = load_gguf_checkpoint(str(file.path))["config"]
    except Exception as error:
        raise RegraftError(f"{file.path} cannot be understood: {error}") from error
    try:
        text = json.dumps(found, default=lambda value: value.item())
        with written_whole(kept) as partial:
            partial.write_text(text)
        return json.loads(text)
    except (OSError, TypeError, AttributeError):
        return found


def _names(file: Any, model: Any) -> dict[str, str]:
    """{tensor of the file: parameter}."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next((k for k, name in MODEL_ARCH_NAMES.items() if name == file.architecture), None)
    if arch is None:
        raise RegraftError(f"{file.path}: unknown architecture {file.architecture!r}")
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    known = get_tensor_name_map(arch, layers)
    found: dict[str, str] = {}
    for parameter in model.state_dict():
        stem, _, end = parameter.rpartition(".")
        for start in range(stem.count(".") + 1):
            if name := known.get_name(".".join(stem.split(".")[start:])):
                found.setdefault(f"{name}.{end}", parameter)
                break
    return found


def _processor(file: Any, model: Any, names: dict[str, str]) -> Callable[..., Any]:
    """process(array, name): how transformers changes a tensor of this architecture, or None."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    kind = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)
    made = kind(config=model.config.to_dict())

    def process(array: np.ndarray, name: str) -> np.ndarray | None:
        elsewhere: dict[str, Any] = {"tensors": {}}
        try:
            result = made.process(
                array, name=name, tensor_key_mapping=names, parsed_parameters=elsewhere
            )
        except Exception:
            return None
        if elsewhere["tensors"]:
            return np.asarray(next(iter(elsewhere["tensors"].values())))
        return result.weights if result.name == name else None

    return process


def _order(tensor: Any, process: Callable[..., Any]) -> Tensor | None:
    """Which row of the file each row of the weights is; None where they are more than moved."""
    rows = np.arange(tensor.shape[0])[:, None]
    found = process(rows, tensor.name)
    if found is None or found.shape != rows.shape or not (np.sort(found, 0) == rows).all():
        return None
    return torch.from_numpy(found[:, 0].copy())


def _dense(tensor: Any, process: Callable[..., Any], shape: tuple[int, ...]) -> Tensor:
    values = process(tensor.dense().numpy(), tensor.name)
    if values is None or values.shape != shape:
        found = "nothing" if values is None else list(values.shape)
        raise RegraftError(
            f"{tensor.path}: {tensor.name} gives {found} where the model takes {list(shape)}"
        )
    return torch.from_numpy(np.array(values, np.float32))


def _placeholder(rows: int, columns: int) -> Tensor:
    """A random matrix whose diagonals are constant."""
    values = torch.randn(rows + columns, generator=torch.Generator().manual_seed(columns)) * 0.02
    return values.as_strided((rows, columns), (1, 1))


def _put(model: Any, name: str, value: Tensor) -> None:
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    setattr(owner, last, torch.nn.Parameter(value, requires_grad=False))
