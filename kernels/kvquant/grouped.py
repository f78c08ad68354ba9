"""Codebook quantization of cached keys and values."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

CPU = torch.device("cpu")
BITS = (2, 3, 4, 8)
CODEBOOKS = ("lloyd_max", "normal_float")
LLOYD_MAX = {
    2: (0.1977, 0.6622),
    3: (0.1025, 0.3160, 0.5595, 0.8810),
    4: (0.0505, 0.1525, 0.2575, 0.3678, 0.4868, 0.6195, 0.7744, 0.9690),
}
"""Positive halves of the levels of least squared error for 64 normal samples scaled to [-1, 1]."""


@cache
def codebook(name: str, bits: int, device: torch.device = CPU) -> Tensor:
    """Ascending float32 levels [2**bits] in [-1, 1]: one of CODEBOOKS below 8 bits, else uniform.

    lloyd_max: see LLOYD_MAX. normal_float: the quantiles of a normal with an exact zero and both
    ends, of QLoRA (Dettmers et al., 2023, arXiv 2305.14314); 4 bits give NF4.
    """
    _check(bits)
    if name not in CODEBOOKS:
        raise ValueError(f"codebook must be one of {CODEBOOKS}, got {name!r}")
    if bits == 8:
        return torch.linspace(-1, 1, 256, device=device)
    if name == "lloyd_max":
        half = torch.tensor(LLOYD_MAX[bits], device=device)
        return torch.cat((-half.flip(0), half))
    wide = 2 ** (bits + 1)
    top = 1 - 0.5 * (1 / wide + 1 / (wide - 2))
    middle = 2 ** (bits - 1)
    grid = partial(torch.linspace, dtype=torch.float64, device=CPU)
    positive = torch.special.ndtri(grid(0.5, top, middle + 1))
    negative = -torch.special.ndtri(grid(top, 0.5, middle))
    levels = torch.cat((negative[:-1], positive))
    return (levels / positive[-1]).to(device, torch.float32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., n] below 2**bits into uint8 [..., n * bits // 8]; 8 divides n."""
    _check(bits)
    if codes.shape[-1] % 8:
        raise ValueError(f"pack needs a multiple of 8 codes, got {codes.shape[-1]}")
    if bits == 8:
        return codes
    if bits == 3:
        words = (codes.unflatten(-1, (-1, 8)).int() << _shifts(8, 3, codes)).sum(-1)
        return ((words.unsqueeze(-1) >> _shifts(3, 8, codes)) & 255).to(torch.uint8).flatten(-2)
    per = 8 // bits
    shifted = codes.unflatten(-1, (-1, per)) << _shifts(per, bits, codes).to(torch.uint8)
    return shifted.sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Unpack uint8 [..., n * bits // 8] into uint8 codes [..., n]."""
    _check(bits)
    if packed.shape[-1] * 8 != n * bits:
        raise ValueError(f"{n} codes of {bits} bits do not fit {packed.shape[-1]} bytes")
    if bits == 8:
        return packed
    if bits == 3:
        words = (packed.unflatten(-1, (-1, 3)).int() << _shifts(3, 8, packed)).sum(-1)
        return ((words.unsqueeze(-1) >> _shifts(8, 3, packed)) & 7).to(torch.uint8).flatten(-2)
    shifts = _shifts(8 // bits, bits, packed).to(torch.uint8)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def quantize(
    x: Tensor,
    levels: Tensor,
    dim: int | tuple[int, ...],
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8, shape of x), scale and zero (size 1 along dim) of x.

    Codes are nearest to x under the scale and zero as rounded to scale_dtype.
    """
    x = x.float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    limit = torch.finfo(scale_dtype).max
    zero = ((high + low) / 2).clamp(-limit, limit).to(scale_dtype)
    scale = ((high - low) / 2).clamp(max=limit).to(scale_dtype)
    divisor = torch.where(scale == 0, 1.0, scale.float())
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize((x - zero.float()) / divisor, midpoints)
    return codes.to(torch.uint8), scale, zero


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, levels: Tensor) -> Tensor:
    """Float32 values of codes; scale and zero broadcast against them."""
    return levels[codes.int()] * scale.float() + zero.float()


@cache
def word_table(name: str, bits: int, device: torch.device = CPU) -> Tensor:
    """Levels of every packed word: [256] for bytes; [4096] for the 12-bit words of 3-bit codes.

    An element is one float32, or the complex64 or complex128 whose bytes are 2 or 4 of them.
    """
    count = {8: 1, 4: 2, 3: 4, 2: 4}[bits]
    words = torch.arange(2 ** (bits * count), device=device).unsqueeze(1)
    codes = (words >> _shifts(count, bits, words)) & (2**bits - 1)
    values = codebook(name, bits, device)[codes]
    return values.view({1: torch.float32, 2: torch.complex64, 4: torch.complex128}[count])[:, 0]


def look_up(packed: Tensor, table: Tensor) -> Tensor:
    """Float32 levels [..., n] of codes packed in uint8 [..., n * bits // 8], by a word_table."""
    words = packed.int()
    if len(table) == 4096:
        a, b, c = words.unflatten(-1, (-1, 3)).unbind(-1)
        words = torch.stack((a | (b & 15) << 8, b >> 4 | c << 4), -1)
    values = table.index_select(0, words.flatten()).view(torch.float32)
    return values.view(*packed.shape[:-1], -1)


def _shifts(count: int, step: int, like: Tensor) -> Tensor:
    return torch.arange(0, count * step, step, dtype=torch.int32, device=like.device)


def _check(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
