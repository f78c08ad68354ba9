"""What launches of the kernels for CUDA share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def flat(x: Tensor) -> Tensor:
    """x as it lies in memory, gaps of a larger capacity included."""
    if not x.numel():
        return x.new_zeros(1)
    if x.is_contiguous():
        return x.view(-1)
    span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((span,), (1,))


def target(device: torch.device) -> dict[str, Any]:
    """TVM's target of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    arch = f"sm_{properties.major}{properties.minor}"
    return {"kind": "cuda", "arch": arch, "host": {"kind": "llvm"}}


def splits(turns: int, places: int, resident: int, constant: int, more: float = 0.0) -> int:
    """Into how many ranges ``turns`` are split: what takes the fewest rounds of turns.

    places: blocks of threads a range; resident: those that run at once; constant: turns that the
    start and the end of a block of threads cost as much as; more: ranges that come on top.
    """

    def cost(count: int) -> float:
        waves = math.ceil(places * (count + more) / resident)
        return waves * (-(-turns // count) + constant)

    return min(range(1, min(turns, 4 * resident) + 1), key=cost, default=0)
