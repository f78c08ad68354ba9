"""Attention of few queries to a dense cache on CUDA, by kernels that TVM generates.

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

SIZES = (64, 80, 96, 128, 256)
ROWS = 64
"""Queries of a key/value head up to which a kernel that reads the cache for 16 of them pays."""
BLOCK, WARPS, RESIDENT, CONSTANT = 32, 4, 3, 3


@dataclass(frozen=True)
class Case:
    """What a kernel is generated for; tiles of 8 rows are a warp's."""

    dtype: str
    size: int
    value_size: int
    tiles: int
    softcap: bool


def attend(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    length: int,
    position: Tensor | None = None,
    mask: Tensor | None = None,
    window: int = 0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attend q [B, Hq, S, D], the last S of T tokens, to the first T of key [B, H, capacity, D] and
    value [B, H, capacity, Dv]; out [B, Hq, S, Dv].

    T is length, plus position (int64 [1], on the device) where it is given. mask: bool
    [B or 1, 1, S, >= T], True attends, instead of the causal one. A query at p with a window w > 0
    sees p-w+1..p. sinks [Hq]: an extra column of the softmax. Runs on the current stream and waits
    for nothing. Raises KernelError for what ``fits`` not: other types than float16 and bfloat16,
    heads not of SIZES, more than ROWS queries a key/value head, GPUs before Ampere; and where
    nothing can be compiled.
    """
    if not fits(q, key, value, mask, sinks):
        raise KernelError(f"no CUDA kernel for {q.dtype} queries {list(q.shape)}")
    batch, query_heads, queries, size = q.shape
    heads, capacity, value_size = key.shape[1], key.shape[2], value.shape[3]
    groups = query_heads // heads
    rows = groups * queries
    tiles = 1 if rows <= 8 or max(size, value_size) > 128 else 2
    case = Case(str(q.dtype).removeprefix("torch."), size, value_size, tiles, softcap > 0)
    turns = -(-capacity // (BLOCK * WARPS))
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    places = batch * heads * -(-rows // (8 * tiles))
    splits = launch.splits(turns, places, RESIDENT * processors, CONSTANT)
    lines = batch * heads * splits * WARPS * rows
    partial = q.new_empty(lines * (value_size + 2), dtype=torch.float32)
    out = q.new_empty(batch, query_heads, queries, value_size)
    rooms = (x.stride(int(heads > 1)) // x.shape[3] for x in (key, value))
    zero, never = _constants(q.device, query_heads)
    seen = zero if mask is None else mask
    _kernel(q.device, case)(
        *(launch.flat(x) for x in (q.contiguous(), key, value)),
        zero if position is None else position,
        launch.flat(seen).view(torch.uint8),
        never if sinks is None else sinks.float().contiguous(),
        *partial.split([lines * value_size, lines, lines]),
        out.view(-1),
        *(batch, heads, groups, queries, splits, length, window, *rooms, int(mask is not None)),
        *(0, 0) if mask is None else (mask.stride(0) * (mask.shape[0] > 1), mask.stride(2)),
        *(size**-0.5 if scale is None else scale, softcap),
    )
    return out


def fits(
    q: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None
) -> bool:
    """Whether there is a kernel for ``attend`` of these."""
    heads, size, value_size = key.shape[1], key.shape[3], value.shape[3]
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and key.dtype == value.dtype == q.dtype
        and {size, value_size} <= set(SIZES)
        and q.shape[1] // heads * q.shape[2] <= ROWS
        and all(_rows_lie_together(x) for x in (key, value))
        and (sinks is None or sinks.dim() == 1)
        and (mask is None or _is_mask(mask, q.shape[2]))
        and torch.cuda.get_device_properties(q.device).major >= 8
    )


def _rows_lie_together(x: Tensor) -> bool:
    """Whether x [B, H, T, D] is the start of every head's rows in a contiguous buffer."""
    batch, heads, _, size = x.shape
    apart = batch > 1 and heads > 1 and x.stride(0) != heads * x.stride(1)
    return x.stride(3) == 1 and x.stride(2) == size and not apart


def _is_mask(mask: Tensor, queries: int) -> bool:
    return (
        mask.dtype == torch.bool
        and mask.dim() == 4
        and mask.shape[1:3] == (1, queries)
        and mask.stride(3) == 1
    )


@cache
def _constants(device: torch.device, heads: int) -> tuple[Tensor, Tensor]:
    """A position 0 and sinks of no weight."""
    return torch.zeros(1, dtype=torch.int64, device=device), torch.full(
        (heads,), float("-inf"), device=device
    )


@cache
def _kernel(device: torch.device, case: Case) -> Any:
    def make() -> Any:
        from regraft.kernels.attention.cuda.generate import build

        return build(case, WARPS)

    return kernel("dense_attend", make, launch.target(device), (case, WARPS))
