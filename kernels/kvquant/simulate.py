"""Keys and values as a quantized cache gives them back, without packing them.

By the quantizers of the cache itself, so that errors measured here are those of the format:
float16 scales, int8 levels, and no more outliers a token than it has room for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.kernels.kvquant.codebook import Codebook
from regraft.kernels.kvquant.feedback import Feedback
from regraft.kernels.kvquant.reference import quantize_keys, quantize_values, ranges


def read_keys(
    k: Tensor,
    scale: Tensor,
    zero: Tensor,
    book: Codebook,
    count: int = 0,
    feedback: Feedback | None = None,
) -> Tensor:
    """float32 [B, H, T, D] of unrotated keys; see ``quantize_keys``."""
    codes, residual = quantize_keys(k, scale, zero, book, count, feedback)
    return _read(book, codes, scale, zero, residual)


def read_values(
    v: Tensor, book: Codebook, count: int = 0, feedback: Feedback | None = None
) -> Tensor:
    """float32 [B, H, T, D] of values; see ``quantize_values``."""
    codes, scale, zero, residual = quantize_values(v, book, count, feedback)
    return _read(book, codes, scale[:, None, :, None], zero[:, None, :, None], residual)


def read_grouped_keys(k: Tensor, book: Codebook, group: int) -> Tensor:
    """float32 [B, H, T, D] of unrotated keys with ranges of each channel over ``group`` tokens;
    the last group may be shorter."""
    parts = []
    for part in k.split(group, 2):
        scale, zero = ranges(part, 2)
        parts.append(read_keys(part, scale, zero, book))
    return torch.cat(parts, 2)


def _read(
    book: Codebook, codes: Tensor, scale: Tensor, zero: Tensor, residual: Tensor | None
) -> Tensor:
    read = book.decode(codes) * scale.float() + zero.float()
    return read if residual is None else read + residual.float()
