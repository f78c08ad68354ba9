"""Attention to a quantised cache on the CPU, by kernels that TVM generates.

Raises KernelError where there is no kernel: the reference can take its place.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regraft.kernels.compiled import LEVELS, KernelError, cpu_level, kernel
from regraft.kernels.kvquant.reference import Body, Levels

SIZES = (64, 80, 96, 128, 256)
MOST = 512
"""Outliers a token in a kernel's memory on the stack."""


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
    heads, rows = exact_key.shape[1], query_heads // exact_key.shape[1] * queries
    key, value, tables = body.key, body.value, [] if body.table is None else [body.table]
    tile = _tile(rows)
    function = _kernel(
        level,
        heads,
        (size, value.size),
        (key.bits, value.bits),
        tile,
        body.table is not None,
        (key.outliers is not None, value.outliers is not None),
        str(exact_key.dtype).removeprefix("torch."),
        key.layout,
    )
    padded = -(-rows // tile) * tile
    splits = max(1, min(-(-torch.get_num_threads() // batch), -(-body.blocks // 8)))
    parts = (batch, splits, heads)
    out = torch.empty(batch, heads, rows, value.size)
    turned = [torch.empty(*parts, padded // tile, size, 8)] if key.outliers is not None else []
    if not exact_key.shape[2]:
        exact_key, exact_value = (x.new_zeros(batch, heads, 1, n) for x, n in
                                  ((exact_key, size), (exact_value, value.size)))  # fmt: skip
        exact_mask = exact_mask.new_full((batch, queries, 1), -math.inf)
    if exact_key.dtype == torch.bfloat16:
        exact_key, exact_value = exact_key.view(torch.uint16), exact_value.view(torch.uint16)
    tensors = [
        *(key.codes, key.levels, key.unit, value.codes, value.levels, value.unit),
        *(key.scale, value.scale, key.zero, value.zero),
        *(table.unflatten(2, (size // 2, 2, 32)) for table in tables),
        *(x for x in (key.outliers, key.offsets) if x is not None),
        *(x for x in (value.outliers, value.offsets) if x is not None),
    ]
    if not body.blocks:
        tensors = [_with_room(x) for x in tensors]
    function(
        q.float().contiguous().view(batch, heads, rows, size),
        out,
        first,
        body.blocks,
        body.group // 32 or 1 << 40,
        scale,
        *tensors,
        *(exact_key, exact_value, exact_mask),
        sinks.view(heads, -1),
        torch.empty(*parts, padded, value.size),
        torch.empty(*parts, padded, 2),
        torch.empty(batch, splits, padded, 256),
        *_tables(level, parts, padded, size),
        torch.empty(*parts, padded),
        *turned,
    )
    return out.view(batch, query_heads, queries, value.size).to(q.dtype)


def _tables(level: str, parts: tuple[int, ...], rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Room for the channels' tables and for the query in the kernel's numbers."""
    if level == "portable":
        return torch.empty(*parts, size, 16), torch.empty(*parts, rows, size)
    return (
        torch.empty(*parts, size, 32, dtype=torch.uint8),
        torch.empty(*parts, rows, size // 2, dtype=torch.int32),
    )


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
    exact_dtype: str,
    layout: str,
) -> Any:
    if not (set(sizes) <= set(SIZES) and set(bits) <= {2, 3, 4} and layout == "llvm"):
        raise KernelError(f"no CPU kernel for heads of {sizes}, {bits} bits, layout {layout}")
    key = (level, heads, *sizes, *bits, rows, rotated, *outliers, exact_dtype)

    def make() -> Any:
        from regraft.kernels.kvquant.llvm import generate

        return generate.make(generate.Shape(*key))

    return kernel("attend", make, LEVELS[level], key)


def append_keys(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    book: Levels,
    bits: int,
    group: int = 0,
    count: int = 0,
    level: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Code whole blocks of keys x [B, H, 32 * n, D], not rotated, in the layout "llvm".

    scale, zero: float16 [1 or B, H, groups, D], a row for ``group`` tokens (a multiple of 32) or,
    with 0, for all. Returns the codes uint8 [B, H, n, 32 * D * bits / 8] and, with at most
    ``count`` outliers a token, their entries int32 [B, n, 32 * count] and offsets int32
    [B, n, H + 1], else None twice: what the reference gives, bit for bit, except that of equally
    far outliers the first channels stay. level: one of LEVELS, the processor's best by default.
    Raises KernelError for bits not in 2, 3, 4, head sizes that are no multiples of 16, more than
    MOST outliers, and where nothing can be compiled.
    """
    x, codes, found = _room(x, bits, count)
    function = _append_kernel("key", x.shape[1], x.shape[3], bits, count, level or cpu_level())
    per_row = group // 32 or 1 << 40
    function(x, codes, book.midpoints, book.levels, book.unit, per_row, scale, zero, *found)
    return (codes, *(found or (None, None)))


def append_values(
    x: Tensor, book: Levels, bits: int, count: int = 0, level: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes, scale and zero (float16 [B, n, 32]), entries and offsets of values: ``append_keys``
    with the ranges of tokens, whose ``count`` largest and smallest values are outliers.

    Of equal ones the first channels count as larger.
    """
    x, codes, found = _room(x, bits, count)
    function = _append_kernel("value", x.shape[1], x.shape[3], bits, count, level or cpu_level())
    scale, zero = (codes.new_empty(len(x), codes.shape[2], 32, dtype=torch.half) for _ in "sz")
    function(x, codes, book.midpoints, book.levels, book.unit, scale, zero, *found)
    return (codes, scale, zero, *(found or (None, None)))


def _room(x: Tensor, bits: int, count: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x as kernels read it, room for its codes, and for entries and offsets."""
    x = x.float()
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, length, size = x.shape
    blocks = length // 32
    codes = torch.empty(batch, heads, blocks, 4 * size * bits, dtype=torch.uint8)
    if not count:
        return x, codes, []
    parts = ((32 * count,), (heads + 1,))
    return x, codes, [torch.empty(batch, blocks, *part, dtype=torch.int32) for part in parts]


@cache
def _append_kernel(kind: str, heads: int, size: int, bits: int, count: int, level: str) -> Any:
    if size % 16 or bits not in (2, 3, 4) or count > MOST:
        raise KernelError(
            f"no CPU kernel codes heads of {size} in {bits} bits with {count} outliers a token"
        )
    key = (kind, heads, size, bits, count)

    def make() -> Any:
        from regraft.kernels.kvquant.llvm import append

        return append.make(append.Shape(*key))

    return kernel("append", make, LEVELS[level], key)
