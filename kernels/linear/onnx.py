"""Packed linear layers in ONNX operators: the bodies of the functions that exports call.

b is a ``frontends.export.builder.Builder``. Codes are signed, around the middle of their range,
[columns, rows], or for onnxruntime's own operators unsigned bytes [rows, ...]; scales and the
rest are [groups, rows] as ``formats.unpack`` gives them, columns first.
"""

from __future__ import annotations

from typing import Any

import torch

from regraft.kernels.linear.formats import SUPER, Format

FLOAT = torch.float32
PARTS = ("codes", "high", "scale", "zero", "super_scale", "super_zero")
"""The order of a function's inputs after the first and the bias; the absent ones are None."""
EIGHT_BITS = 4
"""MatMulNBits' accuracy level at which activations are rounded to 8 bits."""


def linear(
    b: Any, x: Any, bias: Any, *given: Any, rows: int, columns: int, fused: bool, **kind: Any
) -> Any:
    """x [..., columns] times weights [rows, columns] transposed, plus bias, as x's dtype.

    onnxruntime multiplies the codes as they are: it fuses DequantizeLinear with the product. Where
    it would fail to (1.32 in the body of a Loop), not fused, it makes the weights floats at first.
    """
    format, parts = Format(**kind), dict(zip(PARTS, given, strict=False))
    block = format.group or format.block
    codes, scale = _signed(b, parts, format), _scale(b, parts, format)
    wide = b.to(x, FLOAT)
    if not fused:
        levels = b.cast(b.cast(codes, torch.int8), FLOAT)
        groups = format.groups(columns)
        apart = b.op("Reshape", levels, b.constant([groups, columns // groups, rows]))
        weight = b.op("Mul", apart, b.unsqueeze(scale, 1))
        weight = b.op("Reshape", weight, b.constant([columns, rows]))
    elif columns % block:
        factors = b.op("Reshape", scale, b.constant([rows]))
        weight = b.op("DequantizeLinear", codes, factors, dtype=FLOAT, axis=1)
    else:
        factors = _each_block(b, scale, format, columns, rows)
        settings = {"axis": 0, "block_size": block}
        weight = b.op("DequantizeLinear", codes, factors, dtype=FLOAT, **settings)
    return _finished(b, x, b.op("MatMul", wide, weight), bias, parts, format, scale)


def contrib_linear(
    b: Any, x: Any, bias: Any, *given: Any, rows: int, columns: int, **kind: Any
) -> Any:
    """The same by onnxruntime's MatMulNBits."""
    format, parts = Format(**kind), dict(zip(PARTS, given, strict=False))
    block = format.group or format.block
    bits = 4 if format.bits == 4 else 8
    codes = parts["codes"]
    if format.bits == 6:
        shape = b.constant([rows, columns // block, block])
        codes = b.op("Reshape", _bytes(b, parts, -1), shape)
    scale = _scale(b, parts, format)
    factors = b.transpose(_each_block(b, scale, format, columns, rows), 1, 0)
    out = b.op(
        "MatMulNBits", b.to(x, FLOAT), codes, factors, domain="com.microsoft", K=columns, N=rows,
        bits=bits, block_size=block, accuracy_level=EIGHT_BITS,
    )  # fmt: skip
    return _finished(b, x, out, bias, parts, format, scale)


def embedding(b: Any, ids: Any, *given: Any, rows: int, columns: int, **kind: Any) -> Any:
    """Rows of weights [rows, columns] by ids [...]: float32 [..., columns]."""
    format, parts = Format(**kind), dict(zip(PARTS, given, strict=False))
    flat = b.op("Reshape", ids, b.constant([-1]))
    groups = format.groups(columns)
    # not the codes as they are: onnxruntime fuses a product with those that nothing else reads
    codes = b.cast(_signed(b, parts, format), torch.int8)
    codes = b.op("Reshape", codes, b.constant([groups, columns // groups, rows]))
    levels = b.cast(b.op("Gather", codes, flat, axis=2), FLOAT)
    chosen = {
        name: b.op("Gather", part, flat, axis=1)
        for name, part in parts.items()
        if part is not None and name not in ("codes", "high")
    }
    scale = _scale(b, chosen, format)
    found = b.op("Mul", levels, b.unsqueeze(scale, 1))
    if format.zero:
        found = b.op("Add", found, b.unsqueeze(_offset(b, chosen, format, scale), 1))
    return _rows(b, b.transpose(found, 2, 0, 1), ids, columns)


def contrib_embedding(b: Any, ids: Any, *given: Any, rows: int, columns: int, **kind: Any) -> Any:
    """The same by onnxruntime's GatherBlockQuantized."""
    format, parts = Format(**kind), dict(zip(PARTS, given, strict=False))
    codes = parts["codes"]
    bits = 4 if format.bits == 4 else 8
    if format.bits == 6:
        codes = _bytes(b, parts, -1)
    codes = b.op("Reshape", codes, b.constant([rows, columns * bits // 8]))
    scale = _scale(b, parts, format)
    found = b.op(
        "GatherBlockQuantized", codes, ids, b.transpose(scale, 1, 0), domain="com.microsoft",
        dtype=FLOAT, bits=bits, block_size=format.group, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    if not format.zero:
        return found
    offset = b.transpose(_offset(b, parts, format, scale), 1, 0)
    groups = format.groups(columns)
    found = b.op("Reshape", found, b.constant([-1, groups, format.group]))
    chosen = b.op("Gather", offset, b.op("Reshape", ids, b.constant([-1])), axis=0)
    return _rows(b, b.op("Add", found, b.unsqueeze(chosen, 2)), ids, columns)


def half_linear(b: Any, x: Any, bias: Any, weight: Any) -> Any:
    """x times a matrix [rows, columns] of half precision transposed, plus bias, as x's dtype."""
    wide = b.transpose(b.cast(weight, FLOAT), 1, 0)
    out = b.op("MatMul", b.to(x, FLOAT), wide)
    out = out if bias is None else b.op("Add", out, b.to(bias, FLOAT))
    return b.op("CastLike", out, x)


def half_embedding(b: Any, ids: Any, weight: Any) -> Any:
    """Rows of a matrix of half precision by ids, as float32."""
    return b.cast(b.op("Gather", weight, ids, axis=0), FLOAT)


def _finished(
    b: Any, x: Any, out: Any, bias: Any, parts: dict[str, Any], format: Format, scale: Any
) -> Any:
    """Add what zeros and the bias give, in x's dtype."""
    if format.zero:
        grouped = b.reshape(b.to(x, FLOAT), [0] * (len(x.shape) - 1) + [-1, format.group])
        sums = b.op("ReduceSum", grouped, b.constant([-1]), keepdims=0)
        out = b.op("Add", out, b.op("MatMul", sums, _offset(b, parts, format, scale)))
    if bias is not None:
        out = b.op("Add", out, b.to(bias, FLOAT))
    return out if x.dtype == out.dtype else b.op("CastLike", out, x)


def _signed(b: Any, parts: dict[str, Any], format: Format) -> Any:
    """Signed codes [columns, rows]."""
    if format.bits != 6:
        return parts["codes"]
    wide = b.cast(_six(b, parts, 0), torch.int32)
    return b.cast(b.op("Sub", wide, b.constant(32, torch.int32)), torch.int8)


def _bytes(b: Any, parts: dict[str, Any], axis: int) -> Any:
    """Codes of 6 bits around the middle of a byte."""
    wide = b.cast(_six(b, parts, axis), torch.int32)
    return b.cast(b.op("Add", wide, b.constant(96, torch.int32)), torch.uint8)


def _six(b: Any, parts: dict[str, Any], axis: int) -> Any:
    """Codes of their low and high bits, halves and quarters of the axis in a byte."""
    low = [_bits(b, parts["codes"], 4 * i, 4) for i in range(2)]
    high = [_bits(b, parts["high"], 2 * i, 2) for i in range(4)]
    top = b.op("BitShift", b.op("Concat", *high, axis=axis), _byte(b, 4), direction="LEFT")
    return b.op("BitwiseOr", b.op("Concat", *low, axis=axis), top)


def _bits(b: Any, packed: Any, start: int, count: int) -> Any:
    shifted = b.op("BitShift", packed, _byte(b, start), direction="RIGHT") if start else packed
    return b.op("BitwiseAnd", shifted, _byte(b, 2**count - 1))


def _byte(b: Any, value: int) -> Any:
    return b.constant(value, torch.uint8)


def _scale(b: Any, parts: dict[str, Any], format: Format) -> Any:
    """Float32 [groups, rows]."""
    scale = b.cast(parts["scale"], FLOAT)
    return _shared(b, scale, parts["super_scale"], format) if format.nested else scale


def _offset(b: Any, parts: dict[str, Any], format: Format, scale: Any) -> Any:
    """What a weight with the middle code is, float32 [groups, rows]."""
    zero = b.cast(parts["zero"], FLOAT)
    if format.nested:
        zero = b.op("Neg", _shared(b, zero, parts["super_zero"], format))
    middle = float(1 << (format.bits - 1))
    return b.op("Add", zero, b.op("Mul", scale, b.constant(middle, FLOAT)))


def _shared(b: Any, part: Any, unit: Any, format: Format) -> Any:
    """part [groups, rows] times the units [columns / SUPER, rows] of several groups each."""
    rows = b.size(part, 1)
    apart = b.reshape(part, [-1, SUPER // format.group, rows])
    product = b.op("Mul", apart, b.unsqueeze(b.cast(unit, FLOAT), 1))
    return b.reshape(product, [-1, rows])


def _each_block(b: Any, scale: Any, format: Format, columns: int, rows: int) -> Any:
    """The scale of every block, where all columns share one."""
    if format.group:
        return scale
    return b.op("Expand", scale, b.constant([-(-columns // format.block), rows]))


def _rows(b: Any, found: Any, ids: Any, columns: int) -> Any:
    """found as [..., columns] for ids [...]."""
    shape = b.op("Concat", b.op("Shape", ids, dtype=torch.int64), b.constant([columns]), axis=0)
    return b.op("Reshape", found, shape)
