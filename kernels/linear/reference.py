"""Matrix products at the speed of memory (one row) and of the arithmetic units (many)."""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = 4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]; equals F.linear.

    MKL is at its best on Intel's processors alone. On others it runs a matrix-vector product on
    one thread, and a product of many rows a quarter slower than oneDNN.
    """
    if in_blocks(x, weight):
        return linear_in_blocks(x, weight, bias)
    if _mkl_is_slow(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear_in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear as a batch of products over BLOCKS blocks of output channels, a thread each."""
    blocks = weight.view(BLOCKS, -1, weight.shape[1])
    rows = x.reshape(-1, x.shape[-1])
    out = torch.bmm(blocks, rows.t().expand(BLOCKS, -1, -1))
    out = out.view(weight.shape[0], -1).t().reshape(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def in_blocks(x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear`` takes these in blocks."""
    whole = weight.is_contiguous() and weight.shape[0] % BLOCKS == 0
    return x.numel() == x.shape[-1] and whole and _mkl_is_slow(x)


def _mkl_is_slow(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and _other_than_intel()


@cache
def _other_than_intel() -> bool:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
