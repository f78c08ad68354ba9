"""Programs as ONNX models."""

from regraft.frontends.export.causal_lm import export, to_onnx
from regraft.frontends.export.files import Exported
from regraft.frontends.export.module import export_module, module_to_onnx

__all__ = ["Exported", "export", "export_module", "module_to_onnx", "to_onnx"]
