"""Compiled models on disk: safetensors, JSON and compiled regions; no pickle.

A folder holds ``regraft.json`` (the program, the report, and the size and hash of every other
file), ``weights.safetensors``, transformers' own ``config.json`` and ``generation_config.json``,
``calibration.safetensors`` of a calibrated cache, for ``KVQuant(calibration=...)``, and
``regions/`` and ``kernels/``: code for the processor it was compiled on, compiled again on
another. They are native code: load an artefact only from where you would run a program.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from regraft.kernels.compiled import files_in_use, search_path
from regraft.program import RegraftError
from regraft.program.calibration import save_calibration
from regraft.program.folders import cache_dir, folder_written_whole, is_empty
from regraft.program.serialize import (
    cache_tensors,
    program_from_json,
    program_tensors,
    program_to_json,
    report_from_json,
    report_to_json,
)
from regraft.runtime.regions import Workers, compile_regions
from regraft.runtime.warm import warm_up

if TYPE_CHECKING:
    from regraft.runtime.causal_lm import Compiled

VERSION = 1
HEAD, WEIGHTS = "regraft.json", "weights.safetensors"


def save(compiled: Compiled, folder: str | Path) -> None:
    """Write the artefact; the folder appears whole or not at all.

    RegraftError when the folder exists and is not an artefact, or cannot be written.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not (folder / HEAD).is_file() and not is_empty(folder):
        raise RegraftError(f"{folder} exists and is no regraft artefact: name another folder")
    try:
        with folder_written_whole(folder) as made:
            for part in ("regions", "kernels"):
                (made / part).mkdir()
            _write(compiled, made)
    except (OSError, SafetensorError) as error:
        raise RegraftError(f"the artefact cannot be written to {folder}: {error}") from error


def _write(compiled: Compiled, folder: Path) -> None:
    weights, same = _unshared(program_tensors(compiled.program))
    save_file(weights, folder / WEIGHTS)
    compiled.config.save_pretrained(folder)
    compiled.generation_config.save_pretrained(folder)
    for region in compiled.regions.values():
        if region.compiled:
            shutil.copy(region.file, folder / "regions")
    if cache_tensors(compiled.program.cache):
        save_calibration(compiled.program.cache, folder / "calibration.safetensors")
    warm_up(compiled.program)
    for file in files_in_use():
        shutil.copy(file, folder / "kernels")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    head = {
        "format": "regraft",
        "version": VERSION,
        "kind": type(compiled).__name__,
        "dtype": str(compiled.dtype).removeprefix("torch."),
        "program": program_to_json(compiled.program),
        "report": report_to_json(compiled.report),
        "same": same,
        "files": {str(path.relative_to(folder)): _digest(path) for path in files},
    }
    text = json.dumps(head)
    (folder / HEAD).write_text(json.dumps({"sha256": _hash(text.encode()), "content": text}))


def load(folder: str | Path, device: str = "cpu") -> Compiled:
    """The compiled model that ``save`` wrote.

    RegraftError when it is missing, of another version, truncated or changed.
    """
    from regraft.runtime.causal_lm import Compiled

    folder = Path(folder)
    head = _head(folder)
    for name, expected in head["files"].items():
        path = folder / name
        if not path.is_file() or _digest(path) != expected:
            state = "differs from what was saved" if path.is_file() else "is missing"
            raise RegraftError(f"{path} {state}: the artefact is damaged, save it again")
    try:
        tensors = load_file(folder / WEIGHTS, device=device)
        tensors |= {name: tensors[source] for name, source in head["same"].items()}
        program = program_from_json(head["program"], tensors)
        source = SimpleNamespace(
            config=AutoConfig.from_pretrained(folder, local_files_only=True),
            generation_config=GenerationConfig.from_pretrained(folder, local_files_only=True),
            device=torch.device(device),
            dtype=getattr(torch, head["dtype"]),
            name_or_path=str(folder),
        )
        kind = type(head["kind"], (Compiled,), {})
        compiled = kind(program, report_from_json(head["report"]), source)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise RegraftError(f"{folder} is no sound artefact: {error}") from error
    with Workers(cache_dir() / "regions") as workers:
        compile_regions(program, compiled.regions, workers, folder / "regions")
    search_path.append(folder / "kernels")
    warm_up(program)
    return compiled


def _head(folder: Path) -> dict[str, Any]:
    try:
        outer = json.loads((folder / HEAD).read_text())
        text = outer["content"]
        if _hash(text.encode()) != outer["sha256"]:
            raise RegraftError(f"{folder / HEAD} differs from what was saved: save it again")
        head = json.loads(text)
        version = head["version"]
    except FileNotFoundError as error:
        raise RegraftError(f"{folder} is no regraft artefact: it has no {HEAD}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RegraftError(f"{folder / HEAD} is damaged: save the artefact again") from error
    if version != VERSION:
        raise RegraftError(
            f"{folder} has format version {version}, this regraft reads {VERSION}: compile and "
            "save the model again"
        )
    return head


def _unshared(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that safetensors takes, and the name under which each other one is kept."""
    kept: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        if first.setdefault(id(tensor), name) == name:
            kept[name] = tensor.detach().contiguous().clone()
        else:
            same[name] = first[id(tensor)]
    return kept, same


def _digest(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
