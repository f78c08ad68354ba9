"""The quantized cache of one layer: exact sink, packed body, exact tail."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from regraft.kernels.attention.reference import attention
from regraft.kernels.kvquant import dispatch, reference
from regraft.kernels.kvquant.codebook import Codebook, fixed
from regraft.kernels.kvquant.feedback import Feedback, feedback
from regraft.kernels.kvquant.hadamard import hadamard
from regraft.kernels.kvquant.layout import BLOCK, unpack_table
from regraft.kernels.kvquant.reference import (
    Body,
    Packed,
    dequantize,
    ranges,
)
from regraft.kernels.rotary.reference import rotate
from regraft.runtime.buffer import Buffer, RotationTable, check_length

VERIFIED = 16
"""The most tokens of a step that attends without decoding the body."""


@dataclass(frozen=True)
class Coding:
    """How keys or values are coded: bits a code, codebook, share of outliers.

    scale, zero: float16 [1, H, 1, D] of calibrated keys; None: ranges of ``group`` tokens (a
    multiple of 32) for keys, of each token for values. fisher: float32 [H, D, D], what errors of a
    head's channels cost together, for error feedback; None for none.
    """

    bits: int
    book: Codebook
    outliers: float = 0.0
    scale: Tensor | None = None
    zero: Tensor | None = None
    group: int = 64
    fisher: Tensor | None = None

    def to(self, device: torch.device) -> Coding:
        book = replace(
            self.book,
            midpoints=self.book.midpoints.to(device),
            levels=self.book.levels.to(device),
        )
        tensors = (self.scale, self.zero, self.fisher)
        scale, zero, fisher = (None if x is None else x.to(device) for x in tensors)
        return replace(self, book=book, scale=scale, zero=zero, fisher=fisher)


class Store:
    """The packed blocks of keys or of values."""

    def __init__(self, kind: str, coding: Coding, kernels: bool = True) -> None:
        self.kind, self.coding = kind, coding
        self._quantize = dispatch.quantize if kernels else reference.quantize
        self.size, self.layout, self.arranged = 0, "llvm", False
        self._feedback: Feedback | None = None
        self.codes = Buffer(1, 1.0)
        self.scales = Buffer(1, 1.0), Buffer(1, 1.0)
        self.outliers, self.offsets = Buffer(1, 1.0), Buffer(1, 1.0)

    @property
    def buffers(self) -> list[Buffer]:
        return [self.codes, *self.scales, self.outliers, self.offsets]

    def append(self, x: Tensor) -> None:
        """Code whole blocks x [B, H, 32 * n, D], keys not rotated."""
        if not self.size:
            self.size, self.layout = x.shape[-1], "cuda" if x.is_cuda else "llvm"
            self.coding = self.coding.to(x.device)
            if self.coding.fisher is not None:
                self._feedback = feedback(self.coding.fisher, self.coding.scale)
        coding = self.coding
        scales: Any = (coding.scale, coding.zero)
        if self.kind == "key" and coding.scale is None:
            scales = [s.squeeze(3) for s in ranges(x.unflatten(2, (-1, coding.group)), 3)]
        made = self._quantize(
            self.kind, x, coding.book, coding.bits, coding.outliers, self.layout, *scales,
            self._feedback,
        )  # fmt: skip
        parts = [made.codes, made.scale, made.zero, made.outliers, made.offsets]
        for buffer, part in zip(self.buffers, parts, strict=True):
            if part is not None and part is not coding.scale and part is not coding.zero:
                buffer.append(part)

    @property
    def step(self) -> int:
        """Tokens that are coded together."""
        return BLOCK if self.coding.scale is not None else self.coding.group

    def arrange(self, order: Tensor) -> None:
        """Bring calibrated channels into this order, once."""
        if self.coding.scale is not None and self.coding.zero is not None and not self.arranged:
            scale, zero = (x[..., order] for x in (self.coding.scale, self.coding.zero))
            fisher = self.coding.fisher
            fisher = None if fisher is None else fisher[:, order][:, :, order]
            self.coding = replace(self.coding, scale=scale, zero=zero, fisher=fisher)
        self.arranged = True

    @property
    def packed(self) -> Packed:
        coding = self.coding
        scale, zero = (b.data if c is None else c for b, c in zip(
            self.scales, (coding.scale, coding.zero), strict=True))  # fmt: skip
        assert self.codes.data is not None and scale is not None and zero is not None
        return Packed(
            self.kind, coding.bits, self.size, self.layout, self.codes.data, scale, zero,
            coding.book.levels, coding.book.unit, self.outliers.data, self.offsets.data,
        )  # fmt: skip


class QuantizedLayer:
    """Cache with exact first and last tokens and packed blocks of 32 between them.

    At least the last ``tail`` tokens stay exact. Exact keys are kept rotated; what leaves the tail
    is turned back and coded. Channels lie in the pairs (i, i + D/2) that a rotation turns. In a
    left-padded batch a row's sink are its own first tokens: its padding follows them.

    spread: queries, rotated keys and values are kept multiplied by ``hadamard``, and keys are not
    turned back.
    """

    def __init__(
        self,
        key: Coding,
        value: Coding,
        sink: int = 4,
        tail: int = 32,
        kernels: bool = True,
        spread: bool = False,
    ) -> None:
        self.sink, self.tail, self.spread = sink, tail, spread
        self._attend = dispatch.attend if kernels else reference.attend
        self.key, self.value = Store("key", key, kernels), Store("value", value, kernels)
        self._exact = Buffer(8, 1.0), Buffer(8, 1.0)
        self._slots: Tensor | None = None

    @classmethod
    def data_free(
        cls,
        bits: int,
        sink: int = 4,
        tail: int = 32,
        group: int = 64,
        levels: str = "lloyd_max",
        outliers: float = 0.0,
    ) -> QuantizedLayer:
        """Codes with a fixed codebook between the ranges of the data itself; value outliers."""
        book = fixed(levels, bits)
        return cls(Coding(bits, book, group=group), Coding(bits, book, outliers), sink, tail)

    @property
    def _buffers(self) -> list[Buffer]:
        return [*self._exact, *self.key.buffers, *self.value.buffers]

    @property
    def blocks(self) -> int:
        return self.key.codes.length

    @property
    def length(self) -> int:
        return self._exact[0].length + BLOCK * self.blocks

    @property
    def batch(self) -> int:
        return self._exact[0].batch

    @property
    def floor(self) -> int:
        """The shortest nonzero length truncate can reach."""
        body = self.sink + BLOCK * self.blocks if self.blocks else 0
        return max(body, 0 if self._slots is None else self._slots.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor allocated for this layer."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: RotationTable | None = None,
        mask: Tensor | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        interleaved: bool = False,
        offset: int = 0,
    ) -> Tensor:
        """Append unrotated k, v [B, Hkv, S, *] and attend unrotated q; out [B, Hq, S, Dv].

        New tokens are attended exactly. What left the tail is coded before a step of up to `tail`
        tokens, so that truncating undoes the step, and also after a longer one, a prompt.
        """
        start, size = self.length, q.shape[-1]
        if size % 8 or v.shape[-1] % 8:
            raise ValueError("quantized caches need head sizes that are multiples of 8")
        self._flush(table)
        order = pairs(size, 0 if table is None else table.pairs, interleaved, offset)
        if order is not None:
            q, k = q[..., order], k[..., order]
            self.key.arrange(order)
        if table is not None:
            cos, sin = table.rows(start, start + q.shape[2], size // 2)
            q, k = rotate(torch.cat((q, k), 1), cos, sin).tensor_split([q.shape[1]], 1)
        q, k, v = (self._spread(x) for x in (q, k, v))
        if mask is not None and not start:
            self._slots = _sinks_first(mask, self.sink)
        if self._slots is not None:
            mask = None if mask is None else _take(mask, self._slots, 3)
            if not start:
                k, v = _take(k, self._slots, 2), _take(v, self._slots, 2)
        for buffer, x in zip(self._exact, (k, v), strict=True):
            buffer.append(x)
        scale = size**-0.5 if scale is None else scale
        seen = self._seen(q, mask) if self.blocks and not softcap else None
        if seen is not None:
            column = _none(q.shape[1], q.device) if sinks is None else sinks.flatten().float()
            exact = (buffer.view for buffer in self._exact)
            out = self._attend(q, self.body(table), *exact, *seen, column, scale)
        else:
            out = attention(q, *self._all(table), mask, scale, softcap, sinks)
        if k.shape[2] > self.tail:
            self._flush(table)
        return self._spread(out)

    def _spread(self, x: Tensor) -> Tensor:
        """There and, once more, back."""
        return x @ hadamard(x.shape[-1], x.dtype, x.device) if self.spread else x

    def body(self, table: RotationTable | None) -> Body:
        """The packed tokens; table: their rotations."""
        key, coding = self.key.packed, self.key.coding
        rows = None
        if table is not None and not self.spread:
            rows = table.packed(self.sink, self.blocks, key.size // 2, key.layout)
        group = coding.group if coding.scale is None else 0
        return Body(key, self.value.packed, self.blocks, group, rows)

    def read(
        self, kind: int, table: RotationTable | None, interleaved: bool = False, offset: int = 0
    ) -> Tensor:
        """The rotated keys (kind 0) or the values (kind 1) [B, Hkv, T, *], decoded."""
        out = self._spread(self._all(table)[kind])
        order = pairs(out.shape[-1], 0 if table is None else table.pairs, interleaved, offset)
        if order is not None and kind == 0:
            out = out[..., order.argsort()]
        return out if self._slots is None else _take(out, self._slots.argsort(1), 2)

    def truncate(self, length: int) -> None:
        """Keep the first length tokens; only exact tokens can be cut, or all of them."""
        check_length(length, self.length)
        if length == 0:
            return self.reset()
        if length < self.floor:
            raise ValueError(
                f"cannot truncate to {length}: tokens before {self.floor} are quantized; "
                f"truncate to at least {self.floor}, or to 0"
            )
        for buffer in self._exact:
            buffer.truncate(length - BLOCK * self.blocks)

    def reorder(self, index: Tensor) -> None:
        for buffer in self._buffers:
            buffer.reorder(index)
        if self._slots is not None:
            self._slots = self._slots[index]

    def reset(self) -> None:
        for buffer in self._buffers:
            buffer.reset()
        self._slots = None

    def _flush(self, table: RotationTable | None) -> None:
        """Code the front of the tail, keeping ``tail`` tokens."""
        step = self.key.step
        count = (self._exact[0].length - self.sink - self.tail) // step * step
        if count <= 0:
            return
        k, v = (buffer.view[:, :, self.sink : self.sink + count] for buffer in self._exact)
        if table is not None and not self.spread:
            start = self.sink + BLOCK * self.blocks
            cos, sin = table.rows(start, start + count, k.shape[-1] // 2)
            square = (cos * cos + sin * sin).repeat(1, 1, 2).unsqueeze(1)
            k = rotate(k.float(), cos, -sin) / square
        self.key.append(k)
        self.value.append(v)
        for buffer in self._exact:
            buffer.drop(self.sink, count)

    def _all(self, table: RotationTable | None) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of every cached token, in the order of their slots."""
        keys, values = (buffer.view for buffer in self._exact)
        if not self.blocks:
            return keys, values
        body = self.body(table)
        middle = dequantize(body, "key")
        if body.table is not None:
            cos, sin = unpack_table(body.table[:, : self.blocks], body.key.layout)
            middle = rotate(middle, cos, sin)
        middles = middle, dequantize(body, "value")
        front, back = zip(*(x.tensor_split([self.sink], 2) for x in (keys, values)), strict=True)
        parts = zip(front, middles, back, strict=True)
        key, value = (torch.cat((a, b.to(a.dtype), c), 2) for a, b, c in parts)
        return key, value

    def _seen(self, q: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """What queries see: an additive mask [B, S, E] of the exact tokens, and the first body
        token [B, S] int32. None where that does not say it, or they are too many."""
        batch, _, rows, _ = q.shape
        count = self._exact[0].length
        if rows > VERIFIED:
            return None
        if mask is None:
            return _causal(batch, rows, count, q.device)
        if mask.dtype != torch.bool or mask.shape[1] != 1:
            return None
        mask = mask[:, 0].expand(batch, -1, -1)
        sink, body, tail = mask.tensor_split([self.sink, self.sink + BLOCK * self.blocks], -1)
        first = (~body).sum(-1)
        if not torch.equal(body, torch.arange(body.shape[-1], device=q.device) >= first[..., None]):
            return None
        exact = torch.cat((sink, tail), -1)
        return torch.where(exact, 0.0, float("-inf")), first.int()


@lru_cache(64)
def _causal(batch: int, rows: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What ``rows`` queries see, the last of them the last of ``count`` exact tokens."""
    later = torch.ones(rows, count, dtype=torch.bool, device=device).triu(count - rows + 1)
    exact = torch.where(later, float("-inf"), 0.0).repeat(batch, 1, 1)
    return exact, torch.zeros(batch, rows, dtype=torch.int32, device=device)


@cache
def _none(heads: int, device: torch.device) -> Tensor:
    return torch.full((heads,), float("-inf"), device=device)


def _sinks_first(mask: Tensor, sink: int) -> Tensor | None:
    """Which of the first tokens [B, n] lie in the first n slots: each row's first ``sink`` real
    tokens, then its padding. None without padding, or with rows of fewer tokens.

    mask: bool [B, 1, T, T] of a prompt, where every real token sees itself.
    """
    if mask.dtype != torch.bool or mask.shape[2] != mask.shape[3] or not sink:
        return None
    real = mask[:, 0].diagonal(dim1=1, dim2=2)
    padding = real.int().argmax(1, keepdim=True)
    if not padding.any() or (real.shape[1] - padding).min() < sink:
        return None
    slot = torch.arange(int(padding.max()) + sink, device=mask.device).unsqueeze(0)
    moved = torch.where(slot < sink + padding, slot - sink, slot)
    return torch.where(slot < sink, slot + padding, moved)


def _take(x: Tensor, slots: Tensor, dim: int) -> Tensor:
    """x [B, ...] with its first n positions along dim taken from slots [B, n]."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = slots.shape
    x = x.expand(slots.shape[0], *x.shape[1:])
    front = x.narrow(dim, 0, slots.shape[1])
    front = front.gather(dim, slots.view(shape).expand(front.shape))
    return torch.cat((front, x.narrow(dim, slots.shape[1], x.shape[dim] - slots.shape[1])), dim)


@cache
def pairs(size: int, rotated: int, interleaved: bool, offset: int) -> Tensor | None:
    """The order of a head's channels in which pairs are D/2 apart; None: as they are."""
    if not interleaved and rotated in (0, size // 2):
        return None
    channels = torch.arange(size)
    part = channels[offset : offset + 2 * rotated]
    turned = part.view(-1, 2).mT if interleaved else part.view(2, -1)
    rest = torch.cat((channels[:offset], channels[offset + 2 * rotated :])).view(2, -1)
    return torch.cat((turned, rest), 1).flatten()
