"""How the codes of a block of 32 tokens lie in memory, for each target's kernels."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
BLOCK = 32
LAYOUTS = ("llvm", "cuda")
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""3-bit codes are stored as a plane of their two low bits followed by a plane of their high bit."""


def pack(codes: Tensor, bits: int, kind: str, layout: str) -> Tensor:
    """Pack uint8 codes [..., 32, D] below 2**bits into uint8 [..., 32 * D * bits / 8].

    "llvm", keys: channels go in pairs (p, p + D/2), those that a rotation turns together; a row of
    32 tokens for each byte of a token. Values: 16-bit words [token group, channel, parity], whose
    codes are every other token.
    "cuda": what lane 4 * g + q of a warp feeds to mma.m16n8k16, in loads of ``load_bytes`` a lane.
    Keys: [D/16, i, h, e] is token 8 * i + g, channel h * D/2 + 8 * step + 2 * q + e. Values:
    [D/8, j, e] is token 8 * j + 2 * q + e of channel 8 * part + g.
    ValueError for a head size that is not a multiple of 8 (16 for cuda).
    """
    flat = codes.flatten(-2)
    planes, low = [], 0
    for width in PLANES[bits]:
        places = order(kind, width, codes.shape[-1], layout, codes.device)
        part = (flat >> low & 2**width - 1)[..., places].unflatten(-1, (-1, 8 // width))
        planes.append((part << _shifts(width, codes.device)).sum(-1, dtype=torch.uint8))
        low += width
    return torch.cat(planes, -1)


def unpack(packed: Tensor, bits: int, size: int, kind: str, layout: str) -> Tensor:
    """The codes [..., 32, size] that ``pack`` was given."""
    codes, low = None, 0
    lengths = [BLOCK * size * width // 8 for width in PLANES[bits]]
    for width, plane in zip(PLANES[bits], packed.split(lengths, -1), strict=True):
        part = plane.unsqueeze(-1) >> _shifts(width, packed.device) & 2**width - 1
        places = _places(kind, width, size, layout, packed.device)
        part = part.flatten(-2)[..., places] << low
        codes = part if codes is None else codes | part
        low += width
    assert codes is not None
    return codes.unflatten(-1, (BLOCK, size))


def pack_table(cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Rotations [B, 32 * N, D/2] of body tokens as the kernels read them, one block a row.

    "llvm": int16 of 14 fractional bits [B, N, D/2 * 2 * 32] (pair, cos or sin, token).
    "cuda": float16 [B, N, 32 * D/4 * 2 * 2] (token, two pairs, cos or sin, pair of the two).
    """
    table = torch.stack((cos, sin), -1).unflatten(1, (-1, BLOCK))
    if layout == "cuda":
        return table.half().unflatten(3, (-1, 2)).mT.flatten(2)
    return (table.float() * 2**14).round().to(torch.int16).permute(0, 1, 3, 4, 2).flatten(2)


def unpack_table(table: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """float32 cosines and sines [B, 32 * N, D/2] of a packed table."""
    if layout == "cuda":
        parts = table.float().unflatten(2, (BLOCK, -1, 2, 2)).mT.flatten(3, 4)
    else:
        parts = (table.float() / 2**14).unflatten(2, (-1, 2, BLOCK)).permute(0, 1, 4, 2, 3)
    cos, sin = parts.flatten(1, 2).unbind(-1)
    return cos, sin


def load_bytes(size: int, width: int) -> int:
    """Bytes that a lane loads at once of a plane of ``width`` bits on cuda."""
    return next(n for n in (16, 8, 4, 2) if size * width // 8 % n == 0)


@cache
def order(kind: str, width: int, size: int, layout: str, device: torch.device) -> Tensor:
    """Which of the 32 * size codes, token by token, lies in each place."""
    if size % (16 if layout == "cuda" else 8):
        raise ValueError(f"a head of {size} channels cannot be packed for {layout}")
    slots = torch.arange(BLOCK * size, device=device)
    if layout == "cuda":
        if kind == "key":
            lanes = slots.view(4, 8, 2, -1, 4, 2).permute(1, 4, 3, 0, 2, 5)
        else:
            lanes = slots.view(4, 4, 2, -1, 8).permute(4, 1, 3, 0, 2)
        return lanes.reshape(32, -1, 8 * load_bytes(size, width) // width).transpose(0, 1).flatten()
    if kind == "key":
        pairs = slots.view(BLOCK, 2, -1).mT.flatten(1)
        return pairs.unflatten(1, (-1, 8 // width)).transpose(0, 1).flatten()
    return slots.view(-1, 16 // width, 2, size).permute(0, 3, 2, 1).flatten()


@cache
def _places(kind: str, width: int, size: int, layout: str, device: torch.device) -> Tensor:
    return order(kind, width, size, layout, device).argsort()


@cache
def _shifts(width: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)


pack_keys, pack_values = partial(pack, kind="key"), partial(pack, kind="value")
unpack_keys, unpack_values = partial(unpack, kind="key"), partial(unpack, kind="value")
