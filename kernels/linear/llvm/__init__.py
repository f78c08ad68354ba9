"""Packed linear layers of few rows on the CPU, by kernels that TVM generates.

Raises KernelError where there is no kernel: the reference can take its place.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regraft.kernels.compiled import LEVELS, KernelError, cpu_level, kernel
from regraft.kernels.linear.formats import HALVES, ROWS, parse
from regraft.kernels.linear.llvm import direct

TILE, SHAPES = 4, 16
_own = threading.local()


def linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, format: str, rows: int, level: str | None = None
) -> Tensor:
    """x float32 [n, columns] times packed weights [rows, columns], plus bias float32 [rows].

    Activations are rounded to 15 bits by blocks of 32 or 16 columns, but not those that meet
    weights of half precision. level: one of LEVELS, the processor's best by default.
    """
    level = level or cpu_level()
    if format in HALVES:
        return _of_halves(x, packed, bias, format, level)
    kind = parse(format)
    count, columns = x.shape
    if missing := kind.padded(columns) - columns:
        x, columns = torch.nn.functional.pad(x, (0, missing)), columns + missing
    tile = _rows(count)
    out = torch.empty(count, rows)
    extra = () if bias is None else (bias,)
    function = _kernel(level, format, tile, bias is not None)
    scratch = _scratch(-(-count // tile) * tile, columns // kind.block, kind.block)
    function(x.contiguous(), packed, out, *extra, *scratch)
    if not missing and level == cpu_level():
        direct.learn(x, packed, bias, format, rows, tile, function)
    return out


def _of_halves(x: Tensor, weight: Tensor, bias: Tensor | None, format: str, level: str) -> Tensor:
    if x.shape[1] % 16:
        raise KernelError(f"no CPU kernel for {x.shape[1]} columns in {format}")
    count, dtype = x.shape[0], "uint16" if format == "bfloat16" else format
    out = torch.empty(count, weight.shape[0])
    extra = () if bias is None else (bias,)
    function = _half_kernel(level, dtype, _rows(count), bias is not None)
    bits = weight.view(torch.uint16) if format == "bfloat16" else weight
    function(x.contiguous(), bits, out, *extra)
    return out


def _rows(count: int) -> int:
    """Rows that weights meet at once."""
    return count if count <= 2 else TILE


def prepare(format: str, bias: bool) -> None:
    """Make or load all kernels of a format."""
    for rows in (1, 2, TILE):
        if format in HALVES:
            _half_kernel(cpu_level(), "uint16" if format == "bfloat16" else format, rows, bias)
        else:
            _kernel(cpu_level(), format, rows, bias)
    if format not in HALVES:
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
def _half_kernel(level: str, dtype: str, rows: int, bias: bool) -> Any:
    key = (level, dtype, rows, bias)

    def make() -> Any:
        from regraft.kernels.linear.llvm import halves

        return halves.make(*key)

    return kernel("half_linear", make, LEVELS[level], key)


@cache
def _unpack_kernel(level: str, format: str) -> Any:
    def make() -> Any:
        from regraft.kernels.linear.llvm import generate

        return generate.make_unpack(level, format)

    return kernel("unpack", make, LEVELS[level], (level, format))
