"""Packing codes, and reading them, in standard ONNX operators; b is as in ``onnx``."""

from __future__ import annotations

from typing import Any

import torch

from regraft.kernels.kvquant.layout import PLANES


def planes(bits: int, size: int) -> list[tuple[int, int, int]]:
    """For each plane of a token's codes its width, its lowest bit and its bytes; code c of the
    plane lies in byte c % bytes, at bit width * (c // bytes)."""
    found, low = [], 0
    for width in PLANES[bits]:
        found.append((width, low, size * width // 8))
        low += width
    return found


def pack(b: Any, code: Any, bits: int, size: int) -> Any:
    """int32 codes [..., D] as bytes [..., D * bits / 8]."""
    parts = []
    for width, low, each in planes(bits, size):
        plane = code
        if low or width < bits:
            plane = b.op("Div", plane, b.constant(2**low, torch.int32))
            plane = b.op("Mod", plane, b.constant(2**width, torch.int32))
        total = None
        for i in range(8 // width):
            piece = b.slice(plane, i * each, (i + 1) * each, -1)
            if i:
                piece = b.op("Mul", piece, b.constant(2 ** (width * i), torch.int32))
            total = piece if total is None else b.op("Add", total, piece)
        parts.append(b.cast(total, torch.uint8))
    return parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=-1)


def unpack(b: Any, packed: Any, bits: int, size: int) -> Any:
    """What ``pack`` was given."""
    code, start = None, 0
    for width, low, each in planes(bits, size):
        plane = packed if each * 8 == size * bits else b.slice(packed, start, start + each, -1)
        start += each
        pieces = []
        for i in range(8 // width):
            shift = b.constant(width * i, torch.uint8)
            piece = b.op("BitShift", plane, shift, direction="RIGHT") if i else plane
            pieces.append(b.op("BitwiseAnd", piece, b.constant(2**width - 1, torch.uint8)))
        part = b.cast(b.op("Concat", *pieces, axis=-1), torch.int32)
        if low:
            part = b.op("Mul", part, b.constant(2**low, torch.int32))
        code = part if code is None else b.op("Add", code, part)
    return code
