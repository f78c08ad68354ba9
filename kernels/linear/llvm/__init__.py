"""Packed linear layers of few rows on the CPU, by kernels that TVM generates.

Raises KernelError where there is no kernel: the reference can take its place.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regraft.kernels.compiled import LEVELS, cpu_level, kernel
from regraft.kernels.linear.formats import ROWS, parse

TILE, SHAPES = 4, 16
_own = threading.local()


def linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, format: str, rows: int, level: str | None = None
) -> Tensor:
    """x float32 [n, columns] times packed weights [rows, columns], plus bias float32 [rows].

    Activations are rounded to 15 bits by blocks of 32 or 16 columns. level: one of LEVELS, the
    processor's best by default.
    """
    level, kind = level or cpu_level(), parse(format)
    count, columns = x.shape
    if missing := kind.padded(columns) - columns:
        x, columns = torch.nn.functional.pad(x, (0, missing)), columns + missing
    tile = count if count <= 2 else TILE
    out = torch.empty(count, rows)
    extra = () if bias is None else (bias,)
    function = _kernel(level, format, tile, bias is not None)
    scratch = _scratch(-(-count // tile) * tile, columns // kind.block, kind.block)
    function(x.contiguous(), packed, out, *extra, *scratch)
    return out


def prepare(format: str, bias: bool) -> None:
    """Make or load all kernels of a format."""
    for rows in (1, 2, TILE):
        _kernel(cpu_level(), format, rows, bias)
    _unpack_kernel(cpu_level(), format)


def unpacked(
    packed: Tensor, format: str, columns: int, tiles: range, level: str | None = None
) -> Tensor:
    """Tiles of weights as float32 [columns, channels]."""
    padded = parse(format).padded(columns)
    out = torch.empty(padded, len(tiles) * ROWS)
    _unpack_kernel(level or cpu_level(), format)(packed, out, tiles.start)
    return out[:columns]


def _scratch(rows: int, blocks: int, block: int) -> tuple[Tensor, ...]:
    """Working memory of the kernel; each thread keeps that of its last few shapes."""
    kept: dict[Any, tuple[Tensor, ...]] = vars(_own).setdefault("scratch", {})
    shape = (rows, blocks, block)
    if shape not in kept:
        if len(kept) == SHAPES:
            kept.clear()
        kept[shape] = (
            torch.empty(rows, blocks, 2, block, dtype=torch.int8),
            torch.empty(rows, blocks, dtype=torch.int32),
            torch.empty(rows, blocks),
            torch.empty(rows, blocks),
        )
    return kept[shape]


@cache
def _kernel(level: str, format: str, rows: int, bias: bool) -> Any:
    key = (level, format, rows, bias)

    def make() -> Any:
        from regraft.kernels.linear.llvm import generate

        return generate.make(generate.Shape(*key))

    return kernel("packed_linear", make, LEVELS[level], key)


@cache
def _unpack_kernel(level: str, format: str) -> Any:
    def make() -> Any:
        from regraft.kernels.linear.llvm import generate

        return generate.make_unpack(level, format)

    return kernel("unpack", make, LEVELS[level], (level, format))
