"""Ways to code keys and values, as what they read back: fitted, fixed and other people's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from regraft.kernels.kvquant.codebook import Codebook, fixed, gaussian
from regraft.kernels.kvquant.hadamard import hadamard
from regraft.kernels.kvquant.reference import cap, ranges
from regraft.kernels.kvquant.simulate import read_grouped_keys, read_keys, read_values
from regraft.kernels.rotary.reference import rotate
from regraft.passes.budget import token_bits
from regraft.passes.calibrate import KINDS, Fit
from regraft.passes.recorder import Edit

Read = Callable[[Tensor], Tensor]
SHARE = 0.01


@dataclass(frozen=True)
class Mode:
    """Effective bits an element, and what reads a layer's keys and values [1, H, T, D] back,
    layer by layer. turned: keys are coded after rotation."""

    name: str
    bits: float
    reads: Sequence[tuple[Read, Read]]
    turned: bool = False

    def edits(self, nodes: Sequence[fx.Node], sink: int) -> dict[fx.Node, Edit]:
        """For ``Runner``: attention over keys and values that were coded, but for the sink."""
        pairs = zip(nodes, self.reads, strict=True)
        return {node: partial(self._edit, reads, sink) for node, reads in pairs}

    def _edit(self, reads: tuple[Read, Read], sink: int, *args: Any) -> tuple[Any, ...]:
        q, k, v, *rest = args
        cos, sin, style, offset = *rest[3:5], *rest[-2:]
        turn = self.turned and cos is not None
        style = style == "interleaved"
        key = rotate(k, cos, sin, style, offset) if turn else k
        key = torch.cat((key[:, :, :sink], reads[0](key[:, :, sink:]).to(k.dtype)), 2)
        key = rotate(key, cos, -sin, style, offset) if turn else key
        value = torch.cat((v[:, :, :sink], reads[1](v[:, :, sink:]).to(v.dtype)), 2)
        return q, key, value, *rest


def from_fits(name: str, fits: Sequence[dict[str, Fit]], heads: int, size: int) -> Mode:
    """Calibrated codes; effective bits as they are stored."""
    channels = heads * size
    reads, bits = [], 0
    for layer in fits:
        key, value = layer["key"], layer["value"]
        assert key.scale is not None and key.zero is not None
        read_key = partial(
            read_keys, scale=key.scale, zero=key.zero, book=key.book,
            count=cap(key.outliers, channels), feedback=key.feedback,
        )  # fmt: skip
        read_value = partial(
            read_values, book=value.book, count=cap(value.outliers, channels),
            feedback=value.feedback,
        )  # fmt: skip
        reads.append((read_key, read_value))
        bits += sum(
            token_bits(kind, layer[kind].book.bits, layer[kind].outliers, heads, size)
            for kind in KINDS
        )
    return Mode(name, bits / (2 * channels * len(fits)), reads)


def kivi(bits: int, layers: int, group: int = 32) -> Mode:
    """KIVI (arXiv 2402.02750): keys after rotation by channel over ``group`` tokens, values by
    token over ``group`` channels, equal steps; its exact last 128 tokens are coded too."""
    book = fixed("uniform", bits)

    def value(v: Tensor) -> Tensor:
        return _by_vector(v.unflatten(-1, (-1, min(group, v.shape[-1]))), book).flatten(-2)

    pair = partial(read_grouped_keys, book=book, group=group), value
    return Mode(f"uniform (KIVI) {bits}-bit", bits + 32 / group, [pair] * layers, turned=True)


def rotated(bits: int, layers: int, heads: int, size: int, group: int = 64) -> Mode:
    """KVQuant(codebook="rotated"): see ``passes/kvquant.py``."""
    book, turn = fixed("lloyd_max", bits), hadamard(size)

    def key(k: Tensor) -> Tensor:
        return read_grouped_keys(k.float() @ turn, book, group) @ turn

    def value(v: Tensor) -> Tensor:
        return read_values(v.float() @ turn, book) @ turn

    total = sum(token_bits(kind, bits, 0.0, heads, size, group) for kind in KINDS)
    name = f"rotated {bits}-bit"
    return Mode(name, total / (2 * heads * size), [(key, value)] * layers, turned=True)


def rotated_vectors(bits: int, layers: int, size: int) -> Mode:
    """Data-free, after TurboQuant (arXiv 2504.19874): Hadamard rotation of each head's rotated keys
    and of its values, a float16 norm a vector, and the codebook of least error for a normal."""
    book, turn = gaussian(bits), hadamard(size)

    def read(x: Tensor) -> Tensor:
        y = x.float() @ turn
        scale = y.square().mean(-1, keepdim=True).sqrt().half().float()
        return scale * book.decode(book.encode(y / scale.clamp(min=1e-8))) @ turn

    name = f"rotated vectors {bits}-bit"
    return Mode(name, bits + 16 / size, [(read, read)] * layers, turned=True)


def hqq(bits: int, layers: int, group: int = 64) -> Mode:
    """transformers' QuantizedCache with the backend hqq, its axis 1: groups of rotated keys and of
    values of one token; its exact last ``residual_length`` tokens are coded too. ImportError
    without the package hqq."""
    from hqq.core.quantize import Quantizer

    def read(x: Tensor) -> Tensor:
        codes, meta = Quantizer.quantize(
            x.contiguous(), axis=1, device="cpu", compute_dtype=x.dtype, nbits=bits,
            group_size=group,
        )  # fmt: skip
        return Quantizer.dequantize(codes, meta).view(x.shape)

    return Mode(f"QuantizedCache hqq {bits}-bit", bits + 32 / group, [(read, read)] * layers, True)


def _by_vector(x: Tensor, book: Codebook) -> Tensor:
    """x [..., n] with a float16 scale and zero each vector."""
    scale, zero = (part.float() for part in ranges(x, -1))
    return scale * book.decode(book.encode((x - zero) / torch.where(scale == 0, 1.0, scale))) + zero
