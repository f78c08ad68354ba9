from pathlib import Path

import onnx
import onnx_ir as ir


def read(source):
    if isinstance(source, (str, Path)):
        source = onnx.load(source)
    if isinstance(source, bytes):
        source = onnx.load_from_string(source)
    return ir.serde.deserialize_model(source)
