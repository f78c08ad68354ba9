"""GGUF's blocks of quantised weights as codes and scales (ggml-quants.c), nothing rounded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regraft.kernels.linear.formats import SUPER, Format, pack
from regraft.program import RegraftError

BLOCKS = {
    "Q4_0": Format(4, 32),
    "Q4_1": Format(4, 32, zero=True),
    "Q8_0": Format(8, 32),
    "Q4_K": Format(4, 32, zero=True, nested=True),
    "Q6_K": Format(6, 16, nested=True),
}
"""GGUF's types of tensors that stay packed."""
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34, "Q4_K": 144, "Q6_K": 210}
"""Bytes of a block of 32 weights, or SUPER for those that end in K."""

Parts = dict[str, Tensor]


def tiles(kind: str, raw: Tensor, name: str = "the tensor") -> Tensor:
    """Packed weights of raw uint8 [rows, bytes], whole blocks of this type a row.

    RegraftError where a scale is no finite number.
    """
    blocks = raw.unflatten(1, (-1, BYTES[kind]))
    codes, parts = _READ[kind](blocks)
    if not all(x.isfinite().all() for x in parts.values() if x.is_floating_point()):
        raise RegraftError(f"{name} holds weights that are no finite numbers")
    return pack(BLOCKS[kind], codes.flatten(1), **parts)


def columns(kind: str, size: int) -> int:
    """Weights in ``size`` bytes."""
    return size // BYTES[kind] * (SUPER if kind.endswith("K") else 32)


def _halves(blocks: Tensor, start: int) -> Tensor:
    """The float16 at this byte of each block [rows, blocks]."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1)


def _nibbles(bytes_: Tensor) -> Tensor:
    """Low halves of all bytes [..., n], then the high ones."""
    return torch.cat((bytes_ & 15, bytes_ >> 4), -1)


def _q4_0(blocks: Tensor) -> tuple[Tensor, Parts]:
    return _nibbles(blocks[..., 2:]), {"scale": _halves(blocks, 0)}


def _q4_1(blocks: Tensor) -> tuple[Tensor, Parts]:
    return _nibbles(blocks[..., 4:]), {"scale": _halves(blocks, 0), "zero": _halves(blocks, 2)}


def _q8_0(blocks: Tensor) -> tuple[Tensor, Parts]:
    return blocks[..., 2:] ^ 128, {"scale": _halves(blocks, 0)}


def _q4_k(blocks: Tensor) -> tuple[Tensor, Parts]:
    a, b, c = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scale = torch.cat((a & 63, (c & 15) | (a >> 6) << 4), -1)
    zero = torch.cat((b & 63, c >> 4 | (b >> 6) << 4), -1)
    codes = _nibbles(blocks[..., 16:].unflatten(-1, (4, 32))).flatten(-2)
    supers = {"super_scale": _halves(blocks, 0), "super_zero": _halves(blocks, 2)}
    return codes, {"scale": scale.flatten(1), "zero": zero.flatten(1), **supers}


def _q6_k(blocks: Tensor) -> tuple[Tensor, Parts]:
    low = blocks[..., :128].unflatten(-1, (2, 2, 32))
    low = torch.cat((low & 15, low >> 4), -2)
    high = blocks[..., 128:192].unflatten(-1, (2, 32))
    high = torch.stack([high >> 2 * i & 3 for i in range(4)], -2)
    scale = blocks[..., 192:208].contiguous().view(torch.int8).flatten(1)
    codes = (low | high << 4).flatten(-3)
    return codes, {"scale": scale, "super_scale": _halves(blocks, 208)}


_READ: dict[str, Callable[[Tensor], tuple[Tensor, Parts]]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q6_K": _q6_k,
}  # fmt: skip
