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

TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Plan:
    """How a product is laid out: tiles of weights and warps of a block of threads, of which
    ``resident`` are to fit a processor at once; blocks of columns that a warp holds, 4 or 8, and
    how many times as many it asks memory for before."""

    tiles: int
    warps: int
    depth: int
    ahead: int
    resident: int


@dataclass(frozen=True)
class Case:
    """What a kernel is generated for: up to ``rows``, 8 or 16, of activations at once, and whether
    it begins while the kernel before it ends."""

    dtype: str
    result: str
    format: str
    rows: int
    bias: bool
    overlapping: bool
    plan: Plan

    @property
    def channels(self) -> int:
        return self.plan.tiles * ROWS


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    format: str,
    channels: int,
    plan: Plan | None = None,
) -> Tensor:
    """x [n, columns] times packed weights [channels, columns], plus bias [channels], in the type of
    x: sums are float32. The weights are read again for each 16 rows.

    x float32 meets packed weights as three of bfloat16, which lose nothing. plan: what suits the
    sizes by default. Runs on the current stream and waits for nothing. Raises KernelError for other
    types of x than float32, float16 and bfloat16 (than theirs, where weights are of half precision)
    and for columns that are no multiple of 32 then, for GPUs before Ampere, and where nothing can
    be compiled.
    """
    properties = torch.cuda.get_device_properties(x.device)
    name = str(x.dtype).removeprefix("torch.")
    if (name != format) if format in HALVES else (x.dtype not in TYPES):
        raise KernelError(f"no CUDA kernel for activations of {name} and weights in {format}")
    if properties.major < 8:
        raise KernelError("no CUDA kernel for GPUs before Ampere")
    if format in HALVES and x.shape[1] % 32:
        raise KernelError(f"no CUDA kernel for {x.shape[1]} columns in {format}")
    if format not in HALVES and (missing := parse(format).padded(x.shape[1]) - x.shape[1]):
        x = torch.nn.functional.pad(x, (0, missing))
    exact = x.dtype == torch.float32
    given = _three(x) if exact else _aligned(x)
    count, columns = given.shape
    plan = plan or plan_for(format, channels, columns, properties.multi_processor_count, count)
    added = None if bias is None or exact else _aligned(bias.to(x.dtype))
    dtype = str(given.dtype).removeprefix("torch.")
    overlapping = properties.major >= 9
    rows = 8 if count <= 8 else 16
    case = Case(dtype, name, format, rows, added is not None, overlapping, plan)
    out = x.new_empty(count, channels)
    _kernel(x.device, case)(
        *(given.view(-1), _aligned(packed).view(-1), *(() if added is None else (added,))),
        *(out.view(-1), count, columns, channels, packed.shape[1]),
    )
    if exact:
        out = out.view(3, -1, channels).sum(0)
        return out if bias is None else out.add_(bias)
    return out


def plan_for(format: str, channels: int, columns: int, processors: int, count: int) -> Plan:
    """What was fastest on an H100: as many blocks of threads a processor as there are to run, so
    that all begin at once, the next kernel's wait beside them, and none is left for the end."""
    each = channels / ROWS / processors
    ahead = 3 if each > 32 else 1
    if format in HALVES:
        return Plan(1, 16 if each <= 1 else 8, 4, ahead, 1)
    if count > 8 or parse(format).bits == 6:
        if each <= 3:
            return Plan(1, 8, 4, ahead, 2 if each <= 2 else 3)
        return Plan(1, 4, 4, ahead, 4)
    if each <= 1 or (each <= 2 and columns > 8192):
        return Plan(2, 16, 4, ahead, 1) if parse(format).nested else Plan(1, 16, 4, ahead, 2)
    if each <= 3:
        return Plan(1, 8, 4, ahead, 2 if each <= 2 else 3)
    if each <= 4:
        return Plan(2, 8, 4, ahead, 2)
    if each <= 32:
        return Plan(2, 4, 4, ahead, 4)
    return Plan(2, 4, 4, ahead, 5) if parse(format).nested else Plan(1, 8, 4, ahead, 4)


def _three(x: Tensor) -> Tensor:
    """bfloat16 [3 * n, columns], three numbers whose sum is that of x [n, columns]."""
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return torch.cat(parts)


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
