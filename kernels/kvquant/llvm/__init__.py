"""A quantised cache on the CPU: its attention and its codes, by kernels that TVM generates.

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
from regraft.kernels.kvquant.llvm.quantizing import quantize
from regraft.kernels.kvquant.reference import Body

__all__ = ["attend", "quantize"]
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
