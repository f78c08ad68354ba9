"""A token's queries and keys rotated, its keys and values written to the cache, by one kernel that
TVM generates for the CPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from regraft.kernels.compiled import LEVELS, cpu_level, kernel


def fits(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, key: Tensor | None, offset: int = 0) -> bool:
    """Whether ``write`` takes these: one token of one sequence, in float32 throughout."""
    return (
        key is not None
        and q.shape[0] == 1 == q.shape[2]
        and key.shape[0] == 1 == cos.shape[0]
        and offset + 2 * cos.shape[2] <= q.shape[3] == k.shape[3]
        and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (q, k, v, cos, key))
    )


def write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key: Tensor,
    value: Tensor,
    position: int,
    interleaved: bool = False,
    offset: int = 0,
) -> Tensor:
    """Rotated q [1, Hq, 1, D]; rotated k [1, H, 1, D] and v [1, H, 1, Dv] go to this position of
    key and value [1, H, capacity, *]. cos, sin [1, 1, r/2] as for ``rotate``.

    Raises KernelError where nothing can be compiled.
    """
    function = _kernel(cpu_level(), interleaved, offset)
    heads, size, value_size = k.shape[1], k.shape[3], v.shape[3]
    out = torch.empty(q.shape)
    function(
        q.reshape(-1, size), k.reshape(heads, size), v.reshape(heads, value_size),
        cos.reshape(-1), sin.reshape(-1), out.view(-1, size), key[0], value[0], position,
    )  # fmt: skip
    return out


@cache
def _kernel(level: str, interleaved: bool, offset: int) -> Any:
    key = (level, interleaved, offset)

    def make() -> Any:
        from regraft.kernels.rotary import generate

        return generate.make(interleaved, offset)

    return kernel("rotate_write", make, LEVELS[level], key)
