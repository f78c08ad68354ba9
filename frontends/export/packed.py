"""Packed weights in an export: their codes as ONNX types hold them, scales beside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from regraft.frontends.export.builder import Builder, lowers
from regraft.kernels.linear import onnx
from regraft.kernels.linear.formats import HALVES, Format, parse, unpack

BLOCKED = 21
"""The first opset with blocks in DequantizeLinear and tensors of 4 bits."""


@lowers("regraft.packed_linear")
def packed_linear(
    b: Builder, x: ir.Value, packed: ir.Value, bias: Any, format: str, rows: int
) -> ir.Value:
    assert x.shape is not None
    if format in HALVES:
        return b.call("HalfLinear", onnx.half_linear, x, bias, packed)
    columns = x.shape[-1]
    if not isinstance(columns, int):
        raise NotImplementedError("the number of its columns is not known")
    given, settings = _weights(b, packed, parse(format), rows, columns)
    if b.contrib:
        _count(b, "MatMulNBits")
        return onnx.contrib_linear(b, x, bias, *given, **settings)
    return b.call("PackedLinear", onnx.linear, x, bias, *given, fused=not b.is_body, **settings)


@lowers("regraft.packed_embedding")
def packed_embedding(
    b: Builder, ids: ir.Value, packed: ir.Value, format: str, rows: int, columns: int
) -> ir.Value:
    if format in HALVES:
        return b.call("HalfEmbedding", onnx.half_embedding, ids, packed)
    given, settings = _weights(b, packed, parse(format), rows, columns)
    if b.contrib:
        _count(b, "GatherBlockQuantized")
        return onnx.contrib_embedding(b, ids, *given, **settings)
    return b.call("PackedEmbedding", onnx.embedding, ids, *given, **settings)


def _count(b: Builder, name: str) -> None:
    b.fused[name] = b.fused.get(name, 0) + 1


def _weights(
    b: Builder, packed: ir.Value, format: Format, rows: int, columns: int
) -> tuple[list[ir.Value | None], dict[str, Any]]:
    """The parts of packed weights as initialisers, each once, and the format as settings."""
    if not b.contrib and b.opset < BLOCKED:
        raise NotImplementedError(
            f"packed weights in standard operators need opset {BLOCKED}; contrib=True needs none"
        )
    held = packed.const_value
    assert held is not None
    place = (
        held.numpy().ctypes.data,
        rows,
    )  # tiles that FuseLinear joined begin where the first does
    if place not in b.weights.parts:
        b.weights.parts[place] = _parts(b, str(packed.name), held, format, rows, columns)
    found = b.weights.parts[place]
    settings = {"bits": format.bits, "group": format.group, "zero": format.zero}
    settings |= {"nested": format.nested, "rows": rows, "columns": columns}
    return [found.get(name) for name in onnx.PARTS], settings


def _parts(
    b: Builder, name: str, held: Any, format: Format, rows: int, columns: int
) -> dict[str, ir.Value]:
    def read() -> tuple[np.ndarray, dict[str, Tensor]]:
        codes, parts = unpack(torch.from_numpy(held.numpy()), format, columns)
        return codes[:rows].numpy(), {name: part[:rows] for name, part in parts.items()}

    found = {}
    for part, (shape, dtype, lay) in _layouts(format, rows, columns, b.contrib).items():
        make = partial(_laid, read, lay)
        found[part] = b.weights.lazy(f"{name}.{part}", shape, dtype, make)
    for part, tensor in read()[1].items():
        found[part] = b.weights.value(f"{name}.{part}", tensor.t().contiguous())
    return found


def _laid(read: Callable[[], Any], lay: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(lay(read()[0]))


def _layouts(format: Format, rows: int, columns: int, contrib: bool) -> dict[str, Any]:
    """{part: (shape, type, how codes uint8 [rows, columns] become it)}, see ``linear.onnx``."""
    block = format.group or format.block
    width = -(-columns // block) * block
    if format.bits == 6:
        axis = 1 if contrib else 0
        turn = (lambda x: x) if contrib else (lambda x: x.T)
        size = (lambda n: (rows, n)) if contrib else (lambda n: (n, rows))
        return {
            "codes": (size(columns // 2), ir.DataType.UINT8, lambda x: _low(turn(x), axis)),
            "high": (size(columns // 4), ir.DataType.UINT8, lambda x: _high(turn(x), axis)),
        }
    middle = 1 << (format.bits - 1)
    if contrib:
        shape = (rows, width // block, block * format.bits // 8)
        return {"codes": (shape, ir.DataType.UINT8, lambda x: _blob(x, format.bits, width, shape))}
    kinds = {4: (ir.DataType.INT4, ml_dtypes.int4), 8: (ir.DataType.INT8, np.int8)}
    dtype, array = kinds[format.bits]
    return {
        "codes": ((columns, rows), dtype, lambda x: (x.T.astype(np.int16) - middle).astype(array))
    }


def _low(codes: np.ndarray, axis: int) -> np.ndarray:
    """The low 4 bits of both halves of the axis in a byte."""
    first, second = np.split(codes & 15, 2, axis)
    return first | second << 4


def _high(codes: np.ndarray, axis: int) -> np.ndarray:
    """The high 2 bits of all quarters of the axis in a byte."""
    parts = np.split(codes >> 4, 4, axis)
    return parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6


def _blob(codes: np.ndarray, bits: int, width: int, shape: tuple[int, ...]) -> np.ndarray:
    """Codes as MatMulNBits wants them, two of 4 bits in a byte."""
    whole = np.pad(codes, ((0, 0), (0, width - codes.shape[1])))
    if bits == 4:
        whole = whole[:, 0::2] | whole[:, 1::2] << 4
    return whole.reshape(shape)
