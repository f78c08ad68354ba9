"""The rotation that spreads outliers over the channels of a head."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def hadamard(
    size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """An orthogonal symmetric matrix [size, size]: signs in blocks of the largest power of two
    that divides size, which is its own inverse."""
    block = torch.ones(1, 1)
    while size % (2 * len(block)) == 0:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
    block = block / len(block) ** 0.5
    return torch.block_diag(*[block] * (size // len(block))).to(device, dtype)
