"""Quantising whole blocks of keys and values on the CPU, by kernels that TVM generates."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from regraft.kernels.compiled import LEVELS, KernelError, cpu_level, kernel
from regraft.kernels.kvquant.feedback import Feedback
from regraft.kernels.kvquant.layout import BLOCK
from regraft.kernels.kvquant.reference import Levels, Packed, cap

WIDEST = 8192
"""Channels of a token, in all heads, whose errors a block keeps on the stack: 3 MB."""


def quantize(
    kind: str,
    x: Tensor,
    book: Levels,
    bits: int,
    share: float,
    layout: str,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    feedback: Feedback | None = None,
    level: str | None = None,
) -> Packed:
    """The reference's ``quantize``, bit for bit, except which of equal outliers are taken.

    Of equal errors of keys the first by head, token and channel are; of equal values the first
    channels count as larger; feedback carries the difference on to codes. level: one of LEVELS,
    the processor's best by default. Raises KernelError for bits not in 2, 3, 4, other layouts,
    head sizes that are no multiples of 16 up to 256, more than WIDEST channels, and where nothing
    can be compiled.
    """
    batch, heads, length, size = x.shape
    blocks, count = length // BLOCK, cap(share, heads * size)
    shape = (kind, heads, size, bits, count, feedback is not None)
    function = _kernel(level or cpu_level(), layout, *shape)
    x = x.float()
    x = x if x.stride(3) == 1 else x.contiguous()
    codes = torch.empty(batch, heads, blocks, BLOCK * size * bits // 8, dtype=torch.uint8)
    group: tuple[int, ...] = ()
    if scale is None or zero is None:
        scale, zero = (torch.empty(batch, blocks, BLOCK, dtype=torch.float16) for _ in "sz")
    else:
        group = (-(-blocks // scale.shape[2]),)
    outliers = offsets = None
    if count:
        outliers = torch.empty(batch, blocks, BLOCK * count, dtype=torch.int32)
        offsets = torch.empty(batch, blocks, heads + 1, dtype=torch.int32)
    fed = () if feedback is None else (feedback.matrix, feedback.weight)[: 1 + (kind == "key")]
    kept = () if outliers is None else (outliers, offsets)
    book_ = (book.midpoints, book.levels, book.unit)
    function(x, codes, *book_, *group, scale, zero, *fed, *kept)
    numbers = (codes, scale, zero, book.levels, book.unit, outliers, offsets)
    return Packed(kind, bits, size, layout, *numbers)


@cache
def _kernel(
    level: str, layout: str, kind: str, heads: int, size: int, bits: int, count: int, feedback: bool
) -> Any:
    if (
        layout != "llvm" or size % 16 or size > 256 or heads * size > WIDEST
        or bits not in (2, 3, 4)
    ):  # fmt: skip
        raise KernelError(f"no CPU kernel codes {heads} heads of {size} in {bits} bits, {layout}")
    key = (kind, heads, size, bits, count, feedback)

    def make() -> Any:
        from regraft.kernels.kvquant.llvm.block import Shape
        from regraft.kernels.kvquant.llvm.packing import make

        return make(Shape(*key))

    return kernel("quantize", make, LEVELS[level], key)
