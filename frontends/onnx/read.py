"""ONNX files in: parsed, checked, sorted; what is damaged is one RegraftError."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from regraft.frontends.onnx.check import Checker, is_map
from regraft.frontends.onnx.sparse import densified
from regraft.program import RegraftError

OLDEST = 7
_LIMIT = 2**31 - 1


def read(source: str | Path | bytes | onnx.ModelProto) -> ir.Model:
    """The model of a file, of its bytes or of a ModelProto, its nodes sorted.

    External data stays on disk, memory-mapped; it must lie in the model's folder. RegraftError,
    one line with the file's name and the mend, for what is damaged, unsafe or too new.
    """
    folder = None
    if isinstance(source, (str, PathLike)):
        path = Path(source)
        name, folder = str(path), path.parent
        source = _bytes(path)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        name, source = "the model", bytes(source)
    elif isinstance(source, onnx.ModelProto):
        name = "the model"
    else:
        kind = type(source).__name__
        raise RegraftError(f"{kind} is no ONNX model: give a path, bytes or a ModelProto")
    try:
        proto = _parsed(source) if isinstance(source, bytes) else source
        return _model(proto, folder)
    except RegraftError as error:
        raise RegraftError(f"{name}: {_line(error)}") from error
    except Exception as error:
        raise RegraftError(
            f"{name} is damaged or not valid ONNX; onnx.checker says more: {_line(error)}"
        ) from error


def _bytes(path: Path) -> bytes:
    if path.is_dir():
        raise RegraftError(f"{path} is a folder: name the .onnx file in it")
    if not path.is_file():
        raise RegraftError(f"{path} does not exist or is no file: give the path of an .onnx file")
    if path.stat().st_size > _LIMIT:
        raise RegraftError(
            f"{path} is larger than 2 GiB, a protobuf's most: save its weights outside"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise RegraftError(f"{path} cannot be read: {error.strerror}") from error


def _parsed(data: bytes) -> onnx.ModelProto:
    if not data:
        raise RegraftError("the file is empty: fetch or export it again")
    if data.startswith(b"PK\x03\x04"):
        raise RegraftError("this is a zip archive: unpack it and name the .onnx file inside")
    if data.startswith(b"version https://git-lfs"):
        raise RegraftError("this is a Git LFS pointer: fetch the file with `git lfs pull`")
    if _is_text(data[:512]):
        raise RegraftError("this is text, not a binary ONNX file: fetch or export it again")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        if "Depth" in str(error):
            raise RegraftError("graphs nest too deeply: flatten the If and Loop bodies") from error
        raise RegraftError(
            "the file is truncated or no ONNX model: fetch or export it again"
        ) from error
    return proto


def _is_text(data: bytes) -> bool:
    return all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in data)


def _model(proto: onnx.ModelProto, folder: Path | None) -> ir.Model:
    if not proto.HasField("graph"):
        raise RegraftError("it holds no graph: fetch or export it again")
    _check_opsets(proto)
    proto = densified(proto)
    checker = Checker(proto, folder)
    checker.check()
    if checker.maps:
        proto = _without_maps(proto)
    model = ir.serde.deserialize_model(proto)
    if folder is not None:
        ir.external_data.set_base_dir(model.graph, folder)
    if checker.unsorted:
        model.graph.sort()
        for function in model.functions.values():
            function.sort()
    return model


def _check_opsets(proto: onnx.ModelProto) -> None:
    known = {domain: last for domain, (_, last) in onnx.defs.C.schema_version_map().items()}
    functions = [(f.opset_import, f"function {f.name!r}: ") for f in proto.functions]
    for opsets, where in [(proto.opset_import, ""), *functions]:
        for opset in opsets:
            domain = "" if opset.domain == "ai.onnx" else opset.domain
            last = known.get(domain)
            if last is not None and opset.version > last:
                raise RegraftError(
                    f"{where}opset {opset.version} of {domain or 'ai.onnx'} is newer than "
                    f"{last}, the last that onnx {onnx.__version__} knows: upgrade onnx"
                )
            if domain == "" and opset.version < OLDEST:
                raise RegraftError(
                    f"{where}opset {opset.version} is older than {OLDEST}: convert it with "
                    "onnx.version_converter"
                )
    if not proto.opset_import:
        raise RegraftError("it states no opset: export it again")


def _without_maps(proto: onnx.ModelProto) -> onnx.ModelProto:
    """onnx_ir knows no map types; what makes maps needs none."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for info in [*copy.graph.output, *copy.graph.value_info]:
        if is_map(info.type):
            info.ClearField("type")
    return copy


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
