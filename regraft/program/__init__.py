"""The graph that passes rewrite and the runtime lowers."""

from regraft.program.errors import InputError, RegraftError
from regraft.program.program import CacheSpec, LayerState, Program, TensorSpec
from regraft.program.report import Report, Row

__all__ = [
    "CacheSpec", "InputError", "LayerState", "Program", "RegraftError", "Report", "Row",
    "TensorSpec",
]  # fmt: skip
