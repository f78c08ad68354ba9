"""The rotation in standard ONNX operators."""

from __future__ import annotations

from typing import Any


def rotate(b: Any, x: Any, cos: Any, sin: Any, interleaved: bool, offset: int) -> Any:
    """``reference.rotate`` of x [B, H, S, D] by cos, sin [B or 1, S, r/2]."""
    half, size = int(cos.shape[-1]), int(x.shape[-1])
    end = offset + 2 * half
    cos, sin = (b.unsqueeze(t, 1) for t in (cos, sin))
    part = x if end - offset == size else b.slice(x, offset, end, -1)
    if interleaved:
        first, second = (b.slice(part, i, 2 * half, -1, step=2) for i in (0, 1))
    else:
        first, second = b.op("Split", part, outputs=2, axis=-1, num_outputs=2)
    turned = [
        b.op("Sub", b.op("Mul", first, cos), b.op("Mul", second, sin)),
        b.op("Add", b.op("Mul", second, cos), b.op("Mul", first, sin)),
    ]
    if interleaved:
        pairs = b.op("Concat", *(b.unsqueeze(t, -1) for t in turned), axis=-1)
        rotated = b.op("Reshape", pairs, b.constant([0, 0, 0, 2 * half]))
    else:
        rotated = b.op("Concat", *turned, axis=-1)
    if end - offset != size:
        rest = [b.slice(x, 0, offset, -1)] if offset else []
        after = [b.slice(x, end, size, -1)] if end < size else []
        rotated = b.op("Concat", *rest, rotated, *after, axis=-1)
    rotated.shape = x.shape
    return rotated
