"""What was calibrated for a cache, as one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from regraft.program.errors import RegraftError
from regraft.program.folders import written_whole
from regraft.program.program import CacheSpec, LayerState
from regraft.program.serialize import cache_tensors, layer_from_json, layer_to_json

KEY = "regraft calibration"


def save_calibration(cache: CacheSpec, path: str | Path) -> None:
    """Write what ``KVQuant(calibration=path)`` reads; RegraftError where nothing was calibrated."""
    tensors = {name: x.cpu().clone() for name, x in cache_tensors(cache).items()}
    if not tensors:
        raise RegraftError("this cache was not calibrated: compile with KVQuant and calibration=")
    layers = json.dumps([layer_to_json(layer) for layer in cache.layers])
    try:
        with written_whole(Path(path)) as partial:
            save_file(tensors, partial, metadata={KEY: layers})
    except (OSError, SafetensorError) as error:
        raise RegraftError(f"the calibration cannot be written to {path}: {error}") from error


def load_calibration(path: str | Path) -> tuple[LayerState, ...]:
    """The layers' states that ``save_calibration`` wrote; RegraftError where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            layers = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tuple(layer_from_json(i, layer, tensors) for i, layer in enumerate(layers))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RegraftError(f"{path} is no sound calibration: {error}") from error
