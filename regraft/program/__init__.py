"""The graph that passes rewrite and the runtime lowers."""

from regraft.program.errors import RegraftError
from regraft.program.program import CacheSpec, LayerState, Program, TensorSpec
from regraft.program.report import Report, Row

__all__ = ["CacheSpec", "LayerState", "Program", "RegraftError", "Report", "Row", "TensorSpec"]
