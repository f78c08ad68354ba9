"""Attention to a quantised cache on the CPU, by kernels that TVM generates.

Raises KernelError where there is no kernel: the reference can take its place.
"""

from __future__ import annotations

import math
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regraft.kernels.compiled import LEVELS, KernelError, cpu_level, kernel
from regraft.kernels.kvquant.layout import BLOCK
from regraft.kernels.kvquant.reference import (
    Body,
    Levels,
    Packed,
    cap,
    dequantize,
    key_outliers,
    pack_outliers,
    residuals,
)

SIZES = (64, 80, 96, 128, 256)
SHAPES = 8
_own = threading.local()


def attend(
    q: Tensor,
    body: Body,
    exact_key: Tensor,
    exact_value: Tensor,
    exact_mask: Tensor,
    first: Tensor,
    sinks: Tensor,
    scale: float,
    softcap: float = 0.0,
    level: str | None = None,
) -> Tensor:
    """The reference's ``attend``, with an error of about 1e-3 of the output's norm.

    level: one of LEVELS, the processor's best by default. Raises KernelError for head sizes not in
    SIZES, bits not in 2, 3, 4, soft caps, other layouts, and where nothing can be compiled.
    """
    level = level or cpu_level()
    if softcap > 0:
        raise KernelError("kernels for quantized caches have no soft cap")
    batch, query_heads, queries, size = q.shape
    heads, key, value = exact_key.shape[1], body.key, body.value
    rows = query_heads // heads * queries
    tile = _tile(rows)
    function = _kernel(
        level,
        heads,
        (size, value.size),
        (key.bits, value.bits),
        tile,
        body.table is not None,
        (key.outliers is not None, value.outliers is not None),
        exact_key.dtype,
        key.layout,
    )
    splits = max(1, min(-(-torch.get_num_threads() // batch), -(-body.blocks // 8)))
    if not exact_key.shape[2]:
        exact_key, exact_value = (
            x.new_zeros(batch, heads, 1, x.shape[3]) for x in (exact_key, exact_value)
        )
        exact_mask = exact_mask.new_full((batch, queries, 1), -math.inf)
    if exact_key.dtype == torch.bfloat16:
        exact_key, exact_value = exact_key.view(torch.uint16), exact_value.view(torch.uint16)
    packed = [
        *(key.codes, key.levels, key.unit, value.codes, value.levels, value.unit),
        *(key.scale, value.scale, key.zero, value.zero),
        *(x for x in (body.table,) if x is not None),
        *(x for part in (key, value) if part.outliers is not None
          for x in (part.outliers, part.offsets)),
    ]  # fmt: skip
    if not body.blocks:
        packed = [_with_room(x) for x in packed]
    out = torch.empty(batch, query_heads, queries, value.size)
    function(
        q.float().contiguous(),
        out,
        first,
        body.blocks,
        body.group // 32 or 1 << 40,
        scale,
        *packed,
        exact_key,
        exact_value,
        exact_mask,
        sinks,
        *_scratch(level, (batch, splits, heads), -(-rows // tile), tile, size, value.size,
                  key.outliers is not None),
    )  # fmt: skip
    return out.to(q.dtype)


def append(
    x: Tensor,
    packed: Packed,
    midpoints: Tensor,
    start: int,
    group: int = 0,
    level: str | None = None,
) -> None:
    """Quantise whole blocks of x [B, H, 32 * n, D] into ``packed``, from its block start on.

    x: float32, bfloat16 or float16, keys not rotated; midpoints: float32 [2**bits - 1] of the
    codebook. The scales and zeros of keys are read, those of values written; a row of the keys'
    serves ``group`` tokens, all of them where it is 0. Outliers are chosen of values alone. Raises
    KernelError as ``attend`` does.
    """
    kept = packed.kind == "value" and packed.outliers is not None
    outliers = (packed.outliers, packed.offsets) if kept else ()
    count = packed.outliers.shape[2] // 32 if kept else 0
    function = _append_kernel(
        level or cpu_level(), packed.kind, x.shape[1], packed.size, packed.bits, count, x.dtype
    )
    if x.dtype == torch.bfloat16:
        x = x.view(torch.uint16)
    blocks = x.shape[2] // 32
    function(
        *(x, blocks, start, group // 32 or 1 << 40, packed.unit, packed.levels, midpoints),
        *(packed.codes, packed.scale, packed.zero, *outliers),
    )


def quantize(
    kind: str,
    x: Tensor,
    book: Levels,
    bits: int,
    share: float,
    layout: str,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    weight: Tensor | None = None,
) -> Packed:
    """The reference's ``quantize``, bit for bit; KernelError as ``append``."""
    batch, heads, length, size = x.shape
    blocks, count = length // BLOCK, cap(share, heads * size)
    group, outliers, offsets = 0, None, None
    if scale is None or zero is None:
        scale, zero = (torch.empty(batch, blocks, BLOCK, dtype=torch.float16) for _ in "sz")
        if count:
            outliers = torch.empty(batch, blocks, BLOCK * count, dtype=torch.int32)
            offsets = torch.empty(batch, blocks, heads + 1, dtype=torch.int32)
    elif scale.shape[2] > 1:
        group = length // scale.shape[2]
    codes = torch.empty(batch, heads, blocks, BLOCK * size * bits // 8, dtype=torch.uint8)
    packed = Packed(
        *(kind, bits, size, layout, codes, scale, zero, book.levels, book.unit, outliers, offsets)
    )
    append(x, packed, book.midpoints, 0, group)
    if kind == "key" and count:
        read = dequantize(Body(packed, packed, blocks, group), kind)
        residual = residuals(x, read, key_outliers(x, read, count, weight))
        packed.outliers, packed.offsets = pack_outliers(residual, count)
    return packed


@cache
def _append_kernel(
    level: str, kind: str, heads: int, size: int, bits: int, count: int, dtype: torch.dtype
) -> Any:
    if size not in SIZES or bits not in (2, 3, 4) or not count < heads * size - 1:
        raise KernelError(f"no CPU kernel packs {count} outliers, heads of {size}, {bits} bits")
    key = (kind, heads, size, bits, count, str(dtype).removeprefix("torch."))

    def make() -> Any:
        from regraft.kernels.kvquant.llvm.coding import Side, make

        return make(Side(*key))

    return kernel("append", make, LEVELS[level], key)


def _scratch(
    level: str,
    parts: tuple[int, int, int],
    tiles: int,
    tile: int,
    size: int,
    value_size: int,
    outliers: bool,
) -> tuple[Tensor, ...]:
    """Working memory of the kernel; each thread keeps that of its last few shapes."""
    kept: dict[Any, tuple[Tensor, ...]] = vars(_own).setdefault("scratch", {})
    shape = (level, parts, tiles, tile, size, value_size, outliers)
    if shape in kept:
        return kept[shape]
    if len(kept) == SHAPES:
        kept.clear()
    rows = tiles * tile
    if level == "portable":
        tables, query = torch.empty(*parts, size, 16), torch.empty(*parts, rows, size)
    else:
        tables = torch.empty(*parts, size, 32, dtype=torch.uint8)
        query = torch.empty(*parts, rows, size // 2, dtype=torch.int32)
    kept[shape] = (
        torch.empty(*parts, rows, value_size),
        torch.empty(*parts, rows, 2),
        torch.empty(*parts[:2], rows, 256),
        tables,
        query,
        torch.empty(*parts, rows),
        *([torch.empty(*parts, tiles, size, 8)] if outliers else []),
    )
    return kept[shape]


def _with_room(x: Any) -> Any:
    """Tensors of an empty body need some memory all the same."""
    if not isinstance(x, Tensor) or x.numel():
        return x
    return x.new_zeros([max(n, 1) for n in x.shape])


def _tile(rows: int) -> int:
    """Rows that a tile scores at once."""
    return rows if rows <= 4 else next(n for n in (4, 3, 4) if rows % n == 0 or n == 4)


@cache
def _kernel(
    level: str,
    heads: int,
    sizes: tuple[int, int],
    bits: tuple[int, int],
    rows: int,
    rotated: bool,
    outliers: tuple[bool, bool],
    exact_dtype: torch.dtype,
    layout: str,
) -> Any:
    if not (set(sizes) <= set(SIZES) and set(bits) <= {2, 3, 4} and layout == "llvm"):
        raise KernelError(f"no CPU kernel for heads of {sizes}, {bits} bits, layout {layout}")
    dtype = str(exact_dtype).removeprefix("torch.")
    key = (level, heads, *sizes, *bits, rows, rotated, *outliers)

    def make() -> Any:
        from regraft.kernels.kvquant.llvm import generate

        return generate.make(generate.Shape(*key, dtype))

    return kernel("attend", make, LEVELS[level], (key, dtype))
