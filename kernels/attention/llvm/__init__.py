"""Attention of few queries to a dense cache on the CPU, by kernels that TVM generates.

Raises KernelError where there is no kernel: the reference can take its place.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from regraft.kernels.compiled import LEVELS, KernelError, cpu_level, kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPAN, TILE, QUERIES = 256, 4, 16
"""Tokens that are scored at once, rows that share a key, and queries up to which that pays."""


def fits(q: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> bool:
    """Whether there is a kernel for ``attend`` of these, and it pays."""
    return (
        q.device.type == "cpu"
        and q.dtype == key.dtype == value.dtype
        and key.dtype in DTYPES
        and not (key.shape[3] % 16 or value.shape[3] % 16)
        and 0 < q.shape[2] <= QUERIES
        and key.shape[2] >= q.shape[2]
        and (sinks is None or sinks.dim() == 1)
    )


def attend(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    sinks: Tensor,
    scale: float,
    level: str | None = None,
) -> Tensor:
    """Attend q [B, Hq, S, D], the last S of T positions, to key [B, H, T, D] and value
    [B, H, T, Dv]; out [B, Hq, S, Dv], computed in float32.

    Query s of row b sees the keys from first[b, s] (int32 [B, S]) to its own position. sinks:
    float32 [Hq], an extra column of the softmax, -inf for none. Raises KernelError for head sizes
    that 16 does not divide, for other dtypes than DTYPES, and where nothing can be compiled.
    """
    batch, query_heads, queries, size = q.shape
    heads, length, value_size = *key.shape[1:3], value.shape[3]
    if size % 16 or value_size % 16 or key.dtype not in DTYPES or not length:
        raise KernelError(f"no CPU kernel for heads of {size} and {value_size} in {key.dtype}")
    function = _kernel(level or cpu_level(), heads, size, value_size, key.dtype)
    if key.dtype == torch.bfloat16:
        key, value = key.view(torch.uint16), value.view(torch.uint16)
    threads = torch.get_num_threads()
    splits = 1 if batch * heads % threads == 0 else min(threads, -(-length // SPAN))
    rows = -(-(query_heads // heads * queries) // TILE) * TILE
    out = torch.empty(batch, query_heads, queries, value_size)
    parts = (batch, heads, splits, rows)
    sums, softmax = torch.empty(*parts, value_size), torch.empty(*parts, 2)
    function(q.float().contiguous(), key, value, out, first, sinks, scale, sums, softmax)
    return out.to(q.dtype)


@cache
def _kernel(level: str, heads: int, size: int, value_size: int, dtype: torch.dtype) -> Any:
    key = (level, heads, size, value_size, str(dtype).removeprefix("torch."))

    def make() -> Any:
        from regraft.kernels.attention.llvm import generate

        return generate.make(generate.Shape(*key))

    return kernel("dense_attend", make, LEVELS[level], key)
