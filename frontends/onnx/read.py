"""ONNX files to an onnx-ir model."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import defs

from regraft.program import RegraftError


def read(source: str | Path | bytes | onnx.ModelProto) -> ir.Model:
    """The model of a path, bytes or a ModelProto; RegraftError where it is damaged."""
    name = str(source) if isinstance(source, (str, Path)) else "the model"
    try:
        proto = _proto(source)
    except (OSError, DecodeError, ValueError, onnx.checker.ValidationError) as error:
        reason = _line(error)
        raise RegraftError(f"{name} cannot be read as ONNX: {reason}; export it again") from error
    if not proto.graph.node and not proto.graph.output:
        raise RegraftError(f"{name} has no graph: export it again")
    newest = defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > newest:
            raise RegraftError(f"{name} has opset {entry.version}: export it for {newest} or older")
    try:
        return ir.serde.deserialize_model(proto)
    except Exception as error:
        raise RegraftError(f"{name} is damaged: {_line(error)}; export it again") from error


def _proto(source: str | Path | bytes | onnx.ModelProto) -> onnx.ModelProto:
    if isinstance(source, onnx.ModelProto):
        return source
    return onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(source)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
