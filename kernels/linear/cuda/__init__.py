"""Linear layers of few rows on CUDA, weights packed or of half precision, by TVM's kernels.

Raises KernelError where there is no kernel: the reference can take its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regraft.kernels import launch
from regraft.kernels.compiled import KernelError, kernel
from regraft.kernels.linear.formats import HALVES, ROWS, parse

TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """What a kernel is generated for: up to ``rows``, 8 or 16, of activations at once; tiles of
    weights and warps of a block of threads, and blocks of columns that a warp asks for at once, 4 or
    8. overlapping: it begins while the kernel before it ends."""

    dtype: str
    format: str
    rows: int
    tiles: int
    warps: int
    depth: int
    bias: bool
    overlapping: bool = False
    ahead: int = 3
    resident: int = 1

    @property
    def channels(self) -> int:
        return self.tiles * ROWS


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    format: str,
    channels: int,
    plan: tuple[int, int, int] | None = None,
) -> Tensor:
    """x [n, columns] of half precision times packed weights [channels, columns], plus bias
    [channels], in the type of x: sums are float32. The weights are read again for each 16 rows.

    plan: tiles, warps and depth of ``Case``; what suits the sizes by default. Runs on the current
    stream and waits for nothing. Raises KernelError for other types than float16 and bfloat16 (and,
    where weights are of half precision, than theirs), columns that are no multiple of 32 then, GPUs
    before Ampere, and where nothing can be compiled.
    """
    dtype = str(x.dtype).removeprefix("torch.")
    count, columns = x.shape
    if x.dtype not in TYPES or (format in HALVES and dtype != format):
        raise KernelError(f"no CUDA kernel for activations of {dtype} and weights in {format}")
    major = torch.cuda.get_device_properties(x.device).major
    if major < 8:
        raise KernelError("no CUDA kernel for GPUs before Ampere")
    if format not in HALVES and (missing := parse(format).padded(columns) - columns):
        x, columns = torch.nn.functional.pad(x, (0, missing)), columns + missing
    if format in HALVES and columns % 32:
        raise KernelError(f"no CUDA kernel for {columns} columns in {format}")
    tiles, warps, depth, *rest = plan or _plan(x.device, format, channels, columns, count)
    rows, last = 8 if count <= 8 else 16, (bias is not None, major >= 9, *rest)
    case = Case(dtype, format, rows, tiles, warps, depth, *last)
    out = x.new_empty(count, channels)
    added = () if bias is None else (_aligned(bias.to(x.dtype)),)
    _kernel(x.device, case)(
        *(_aligned(x).view(-1), _aligned(packed).view(-1), *added, out.view(-1)),
        *(count, columns, channels, packed.shape[1]),
    )
    return out


def _plan(
    device: torch.device, format: str, channels: int, columns: int, count: int
) -> tuple[int, int, int]:
    """Tiles, warps and depth."""
    return (1, 8, 4)


def _aligned(x: Tensor) -> Tensor:
    """x, contiguous and readable by 16 bytes at once."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@cache
def _kernel(device: torch.device, case: Case) -> Any:
    def make() -> Any:
        from regraft.kernels.linear.cuda.generate import build

        return build(case)

    return kernel("cuda_linear", make, launch.target(device), case, case.overlapping)
