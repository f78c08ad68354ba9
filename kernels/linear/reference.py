"""Matrix products with few rows, at the speed of memory."""

import time
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 5
SPLIT = 4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]; equals F.linear.

    Few rows on a CPU are a batch of matrix products over blocks of output channels where that
    is faster: some BLAS libraries run a matrix-vector product on one thread.
    """
    rows = x.numel() // x.shape[-1]
    if rows > ROWS or not splits(x, weight) or not _faster(weight.shape, weight.dtype, rows):
        return F.linear(x, weight, bias)
    return linear_in_blocks(x, weight, bias)


def linear_in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear as a batch of products over SPLIT blocks of output channels."""
    out = _split(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def splits(x: Tensor, weight: Tensor) -> bool:
    """Whether linear_in_blocks takes these."""
    return x.device.type == "cpu" and weight.is_contiguous() and weight.shape[0] % SPLIT == 0


def _split(x: Tensor, weight: Tensor) -> Tensor:
    blocks = weight.view(SPLIT, -1, weight.shape[1])
    out = torch.bmm(blocks, x.t().expand(SPLIT, -1, -1))
    return out.view(weight.shape[0], -1).t()


@cache
def _faster(shape: torch.Size, dtype: torch.dtype, rows: int) -> bool:
    """Whether blocks beat F.linear here, by a few calls on weights of this shape."""
    copies = max(2, min(8, 2**26 // (shape[0] * shape[1] * dtype.itemsize) + 1))
    weights = [torch.randn(shape).to(dtype) for _ in range(copies)]
    x = torch.randn(rows, shape[1]).to(dtype)
    best = {}
    for _ in range(3):
        for function in (_split, F.linear):
            start = time.perf_counter()
            for weight in weights:
                function(x, weight)
            seconds = time.perf_counter() - start
            best[function] = min(best.get(function, seconds), seconds)
    return best[_split] < best[F.linear]
