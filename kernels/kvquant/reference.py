"""Codebook quantization of cached keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)


def normal_float_codebook(bits: int) -> Tensor:
    """Ascending float32 levels [2**bits] in [-1, 1], both ends included.

    Below 8 bits: the NormalFloat construction of QLoRA (Dettmers et al., 2023,
    arXiv 2305.14314), quantiles of a normal with an exact zero; 4 bits give NF4.
    8 bits: a uniform grid.
    """
    _check(bits)
    if bits == 8:
        return torch.linspace(-1, 1, 256)
    wide = 2 ** (bits + 1)
    top = 1 - 0.5 * (1 / wide + 1 / (wide - 2))
    half = 2 ** (bits - 1)
    positive = torch.special.ndtri(torch.linspace(0.5, top, half + 1, dtype=torch.float64))
    negative = -torch.special.ndtri(torch.linspace(top, 0.5, half, dtype=torch.float64))
    levels = torch.cat((negative[:-1], positive))
    return (levels / positive[-1]).float()


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
    x: Tensor, codebook: Tensor, dim: int, scale_dtype: torch.dtype = torch.float16
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
    midpoints = (codebook[1:] + codebook[:-1]) / 2
    codes = torch.bucketize((x - zero.float()) / divisor, midpoints)
    return codes.to(torch.uint8), scale, zero


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, codebook: Tensor) -> Tensor:
    """Float32 values of codes; scale and zero broadcast against them."""
    return codebook[codes.int()] * scale.float() + zero.float()


def _shifts(count: int, step: int, like: Tensor) -> Tensor:
    return torch.arange(0, count * step, step, dtype=torch.int32, device=like.device)


def _check(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
