"""Regraft: compile, transform and run transformer inference graphs."""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "kernels").is_dir() and (_checkout / "passes").is_dir():
    __path__.append(str(_checkout))

_public = {
    "compile": "regraft.compiler",
    "load": "regraft.compiler",
    "coexecute": "regraft.runtime.coexec.function",
    "coexecution": "regraft.runtime.coexec.function",
    "Compiled": "regraft.runtime.causal_lm",
    "Program": "regraft.program",
    "Pass": "regraft.passes.base",
    "PassResult": "regraft.passes.base",
    "RegraftError": "regraft.program",
    "RaiseAttention": "regraft.passes.raise_attention",
    "FuseLinear": "regraft.passes.fuse_linear",
    "CleanUp": "regraft.passes.clean_up",
    "OutlineLayers": "regraft.passes.outline",
    "KVQuant": "regraft.passes.kvquant",
    "WeightQuant": "regraft.passes.weight_quant",
    "KeepPacked": "regraft.passes.keep_packed",
    "Prune": "regraft.passes.prune",
    "save_masks": "regraft.passes.pruning.masks",
    "save_calibration": "regraft.program.calibration",
}
__all__ = sorted(_public)


def __getattr__(name: str) -> Any:
    if name not in _public:
        raise AttributeError(f"module 'regraft' has no attribute {name!r}")
    return getattr(import_module(_public[name]), name)
