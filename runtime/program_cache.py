"""Programs that were captured and transformed before, by what they were made from.

An entry is one safetensors file: constants as tensors, the graph as JSON in its header. The
model's own parameters are taken from the model, stacked ones are stacked again, packed ones read
again from the file that they come from.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regraft.program import Program, RegraftError, Report
from regraft.program.folders import written_whole
from regraft.program.serialize import (
    program_from_json,
    program_tensors,
    program_to_json,
    report_from_json,
    report_to_json,
)

log = logging.getLogger("regraft")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def fingerprint(model: torch.nn.Module, settings: Sequence[Any]) -> str | None:
    """A key of all that the program depends on but the weights' values.

    That is: each module's class and source, its plain attributes, its buffers, the shapes of its
    parameters and which of them are one; the settings; the sources and versions of regraft and
    its libraries. None where that cannot be known: hooks, patched methods, unread sources.
    """
    import transformers

    digest = hashlib.sha256()

    def add(*items: Any) -> None:
        digest.update(repr(items).encode())

    passes = [item.identity() if hasattr(item, "identity") else item for item in settings]
    add(torch.__version__, transformers.__version__, _own_source(), passes)
    kinds: set[Any] = {type(module) for module in model.modules()}
    kinds |= {type(item) for item in settings if hasattr(item, "__dataclass_fields__")}
    for source in sorted({_source(kind) for kind in kinds}, key=str):
        if source is None:
            return None
        add(source)
    if isinstance(model, transformers.PreTrainedModel):
        add(model.config.to_json_string(use_diff=False))
    for path, module in model.named_modules():
        if any(getattr(module, hooks) for hooks in _HOOKS):
            return None
        add(path, type(module).__qualname__)
        for name, value in sorted(vars(module).items()):
            if inspect.isroutine(value):
                if hasattr(type(module), name) or "<" in value.__qualname__:
                    return None
                add(name, value.__module__, value.__qualname__)
            if isinstance(value, _PLAIN):
                add(name, value)
    first: dict[int, str] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        add(name, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        add(first.setdefault(id(tensor), name))
    for name, buffer in model.named_buffers():
        add(name, buffer.dtype, buffer.shape, _bytes(buffer))
    return digest.hexdigest()[:32]


def store(path: Path, program: Program, report: Report) -> None:
    """Keep the program, if it is all graph; one notice where the folder cannot take it."""
    try:
        graphs = program_to_json(program)
    except RegraftError:
        return
    parameters, stacked, packed = {}, {}, {}
    for prefix, part in program.parts.items():
        known = part.metadata["parameters"]
        parameters |= {prefix + name: source for name, source in known.items()}
        for name, parts in part.metadata.get("stacked", {}).items():
            stacked[prefix + name] = [known[each] for each in parts]
        for name, parts in part.metadata.get("packed", {}).items():
            packed[prefix + name] = parts
    used = program_tensors(program)
    constants = {
        name: tensor.detach().contiguous().clone()
        for name, tensor in used.items()
        if not any(name in known for known in (parameters, stacked, packed))
    }
    entry = {
        "program": graphs,
        "report": report_to_json(report),
        "parameters": {name: source for name, source in parameters.items() if name in used},
        "stacked": {name: sources for name, sources in stacked.items() if name in used},
        "packed": {name: sources for name, sources in packed.items() if name in used},
    }
    try:
        with written_whole(path) as partial:
            save_file(constants, partial, metadata={"regraft": json.dumps(entry)})
    except (OSError, SafetensorError) as error:
        log.warning("regraft: the compiled program is not kept for next time: %s", error)


def fetch(
    path: Path, model: torch.nn.Module, packed: Callable[[list[str]], Tensor] | None = None
) -> tuple[Program, Report] | None:
    """The program of an earlier compilation on this model's weights, if there is one.

    packed(names): what the tensors of these names in the model's file are packed to, joined.
    """
    if not path.is_file():
        return None
    try:
        device = str(next(model.parameters()).device)
        with safe_open(path, "pt", device=device) as file:
            entry = json.loads(file.metadata()["regraft"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        known: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        known |= dict(model.named_buffers(remove_duplicate=False))
        tensors |= {name: known[source] for name, source in entry["parameters"].items()}
        made: dict[tuple[str, ...], Tensor] = {}
        for name, parts in entry["stacked"].items():
            if tuple(parts) not in made:
                with torch.no_grad():
                    stacked = torch.cat([known[part] for part in parts])
                made[tuple(parts)] = torch.nn.Parameter(stacked, requires_grad=False)
            tensors[name] = made[tuple(parts)]
        held: dict[tuple[str, ...], Tensor] = {}
        for name, parts in entry["packed"].items():
            if tuple(parts) not in held:
                assert packed is not None
                held[tuple(parts)] = packed(parts)
            tensors[name] = held[tuple(parts)]
        program = program_from_json(entry["program"], tensors)
        return program, report_from_json(entry["report"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RegraftError) as error:
        log.warning("regraft: a kept program is damaged and is made anew: %s", error)
        path.unlink(missing_ok=True)
        return None


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@cache
def _source(kind: type) -> str | None:
    try:
        file = inspect.getsourcefile(kind)
    except (TypeError, OSError):
        return None
    return _hash(Path(file)) if file and Path(file).is_file() else None


@cache
def _own_source() -> str:
    import regraft

    files = sorted({file for folder in regraft.__path__ for file in _python_files(Path(folder))})
    return hashlib.sha256("".join(map(_hash, files)).encode()).hexdigest()


def _python_files(folder: Path) -> list[Path]:
    inside = ("program", "frontends", "passes", "runtime", "kernels")
    return [file for name in inside for file in (folder / name).rglob("*.py")]


@cache
def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
