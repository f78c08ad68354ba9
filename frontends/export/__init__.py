"""Programs as ONNX models."""

from regraft.frontends.export.causal_lm import Exported, export, to_onnx

__all__ = ["Exported", "export", "to_onnx"]
