"""Quantized keys and values of one layer: the specification of its append and attend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from regraft.kernels.kvquant.feedback import Feedback
from regraft.kernels.kvquant.layout import BLOCK, pack, unpack, unpack_table
from regraft.kernels.rotary.reference import rotate


class Levels(Protocol):
    """A codebook: code = number of midpoints below the value, read as levels[code] * unit.

    midpoints float32 [L - 1] ascending; levels int8 [L] ascending, L <= 2**bits.
    """

    midpoints: Tensor
    levels: Tensor
    unit: float


@dataclass
class Packed:
    """Keys or values [B, H, 32 * N, D] in blocks of 32 tokens; tensors may have room for more.

    codes: uint8 [B, H, N, 32 * D * bits / 8]. A value reads as scale * unit * levels[code] + zero.
    scale, zero: float16, of keys [B or 1, H, groups, D], of values [B, N, 32] for all heads.
    outliers: int32 [B, N, 32 * c], token << 24 | channel << 16 | float16 residual, by head;
    offsets: int32 [B, N, H + 1], where each head's begin and the last one's end. None without.
    With layout "cuda" a head's are sorted, of keys by token, of values by channel.
    """

    kind: str
    bits: int
    size: int
    layout: str
    codes: Tensor
    scale: Tensor
    zero: Tensor
    levels: Tensor
    unit: float
    outliers: Tensor | None = None
    offsets: Tensor | None = None


@dataclass
class Body:
    """The quantized tokens of a layer. A row of the keys' scales serves ``group`` tokens, all of
    them where it is 0; table holds their rotations (see ``pack_table``), None for none."""

    key: Packed
    value: Packed
    blocks: int
    group: int = 0
    table: Tensor | None = None


def cap(share: float, size: int) -> int:
    """Outliers of a token with ``size`` channels in all heads."""
    return min(math.ceil(share * size - 1e-9), size)


def ranges(x: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """float16 scale and zero of x, size 1 along dim."""
    return _scale_and_zero(x.amin(dim, keepdim=True), x.amax(dim, keepdim=True))


def encode(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    book: Levels,
    feedback: Feedback | None = None,
    exact: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8) of x [B, H, T, D], what they stand for, and what they read as, float32.

    scale and zero broadcast against x. Codes stand for x itself or, with feedback, for what makes
    up for the errors of the channels coded before; those that are exact (bool) have none.
    """
    scale, zero = scale.float(), zero.float()
    y = (x.float() - zero) / torch.where(scale == 0, 1.0, scale)
    levels = book.levels.float() * book.unit
    target, aim = x.float(), y
    if feedback is None:
        codes = torch.bucketize(y.contiguous(), book.midpoints, out_int32=True)
    else:
        codes, aim = feedback.in_turn(y, book.midpoints, levels, exact)
        target = target + (aim - y) * scale
    return codes.to(torch.uint8), target, levels[codes.int()] * scale + zero


def quantize_keys(
    k: Tensor,
    scale: Tensor,
    zero: Tensor,
    book: Levels,
    count: int = 0,
    feedback: Feedback | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Codes [B, H, T, D] of keys, and the residuals of their outliers.

    scale, zero: float16 [1 or B, H, 1 or T, D]. The residuals are float16 [B, H, T, D], zero
    elsewhere; None where count is 0.
    """
    exact = None
    if count:
        weight = None if feedback is None else feedback.weight
        exact = key_outliers(k, encode(k, scale, zero, book)[2], count, weight)
    codes, target, read = encode(k, scale, zero, book, feedback, exact)
    return codes, None if exact is None else residuals(target, read, exact)


def key_outliers(k: Tensor, read: Tensor, count: int, weight: Tensor | None = None) -> Tensor:
    """Which keys are kept beside their codes, bool [B, H, T, D]: of each block of 32 tokens the
    32 * count whose codes err most, errors weighted by channel (weight [1, H, 1, D]).

    By block, since a few tokens (delimiters that draw attention) err in many channels and most in
    none. A shorter block at the end has room for count a token.
    """
    error = (k.float() - read).abs()
    error = (error if weight is None else error * weight.float()).transpose(1, 2)
    blocks = [
        _largest(part, count * part.shape[1]) for part in error.split(BLOCK, 1) if part.shape[1]
    ]
    return torch.cat(blocks or [error.bool()], 1).transpose(1, 2)


def _largest(x: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest elements of each row of x [B, ...] are, zeros left out."""
    flat = x.flatten(1)
    largest, index = flat.topk(count, -1)
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, index, largest > 0).view(x.shape)


def quantize_values(
    v: Tensor, book: Levels, count: int = 0, feedback: Feedback | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Codes [B, H, T, D], scale and zero [B, T] and residuals [B, H, T, D] of values.

    The ``count`` largest and smallest of a token, half of each, are its outliers; the next ones
    its range.
    """
    flat = v.float().transpose(1, 2).flatten(2)
    high, low = count - count // 2, count // 2
    top, bottom = flat.topk(min(high + 1, flat.shape[-1]), -1), flat.topk(low + 1, -1, False)
    whole = count == flat.shape[-1]
    maximum = torch.zeros_like(top[0][..., -1]) if whole else top[0][..., -1]
    minimum = maximum if whole else bottom[0][..., -1]
    scale, zero = _scale_and_zero(minimum, maximum)
    exact = None
    if count:
        exact = torch.zeros_like(flat, dtype=torch.bool)
        exact.scatter_(-1, top[1][..., :high], True).scatter_(-1, bottom[1][..., :low], True)
        exact = exact.unflatten(2, (v.shape[1], -1)).transpose(1, 2)
    wide = [part[:, None, :, None] for part in (scale, zero)]
    codes, target, read = encode(v, wide[0], wide[1], book, feedback, exact)
    return codes, scale, zero, None if exact is None else residuals(target, read, exact)


def quantize(
    kind: str,
    x: Tensor,
    book: Levels,
    bits: int,
    share: float,
    layout: str,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    feedback: Feedback | None = None,
) -> Packed:
    """Whole blocks of keys or values [B, H, 32 * n, D], with ``share`` of outliers.

    Keys are not rotated and come with their scale and zero, float16 [1 or B, H, groups, D]; a row
    serves as many tokens as there are to each.
    """
    count = cap(share, x.shape[1] * x.shape[3])
    if scale is None or zero is None:
        codes, scale, zero, residual = quantize_values(x, book, count, feedback)
        scale, zero = (part.unflatten(1, (-1, BLOCK)) for part in (scale, zero))
    else:
        group = x.shape[2] // scale.shape[2]
        wide = [part.repeat_interleave(group, 2) for part in (scale, zero)]
        codes, residual = quantize_keys(x, wide[0], wide[1], book, count, feedback)
    outliers = (None, None) if residual is None else pack_outliers(residual, count, kind, layout)
    packed = pack(codes.unflatten(2, (-1, BLOCK)), bits, kind, layout)
    size, levels = x.shape[3], (book.levels, book.unit)
    return Packed(kind, bits, size, layout, packed, scale, zero, *levels, *outliers)


def pack_outliers(
    residual: Tensor, count: int, kind: str = "key", layout: str = "cuda"
) -> tuple[Tensor, Tensor]:
    """Entries int32 [B, N, 32 * count] and offsets int32 [B, N, H + 1] of residuals
    [B, H, 32 * N, D] with at most ``count`` nonzero a token."""
    batch, heads, length, size = residual.shape
    blocks = residual.unflatten(2, (-1, BLOCK)).transpose(1, 2).flatten(0, 1)
    if kind == "value" and layout == "cuda":
        row, head, channel, token = blocks.mT.nonzero(as_tuple=True)
    else:
        row, head, token, channel = blocks.nonzero(as_tuple=True)
    bits = blocks[row, head, token, channel].half().view(torch.int16).int() & 0xFFFF
    counts = blocks.new_zeros(len(blocks), heads + 1, dtype=torch.int64)
    counts.index_put_((row, head + 1), torch.ones_like(row), accumulate=True)
    offsets = counts.cumsum(1)
    starts = counts.sum(1).cumsum(0) - counts.sum(1)
    place = torch.arange(len(row), device=row.device) - starts[row]
    entries = blocks.new_zeros(len(blocks), BLOCK * count, dtype=torch.int32)
    entries[row, place] = token.int() << 24 | channel.int() << 16 | bits
    shape = (batch, length // BLOCK, -1)
    return entries.view(shape), offsets.int().view(shape)


def unpack_outliers(packed: Packed, blocks: int) -> Tensor:
    """float32 residuals [B, H, 32 * blocks, D]."""
    assert packed.outliers is not None and packed.offsets is not None
    entries, offsets = packed.outliers[:, :blocks], packed.offsets[:, :blocks]
    batch, _, places = entries.shape
    heads = offsets.shape[-1] - 1
    index = torch.arange(places, device=entries.device).expand(entries.shape).contiguous()
    head = torch.searchsorted(offsets[..., 1:].long().contiguous(), index, right=True)
    used = head < heads
    token, channel = entries >> 24, entries >> 16 & 255
    value = (entries & 0xFFFF).to(torch.int16).view(torch.float16).float()
    out = value.new_zeros(batch, blocks, heads, BLOCK, packed.size)
    row = torch.arange(batch * blocks, device=entries.device).view(batch, blocks, 1)
    place = ((row * heads + head) * BLOCK + token) * packed.size + channel
    out.view(-1)[place[used]] = value[used]
    return out.transpose(1, 2).flatten(2, 3)


def dequantize(body: Body, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Keys, not rotated, or values [B, H, 32 * N, D] as they read."""
    packed = body.key if kind == "key" else body.value
    codes = unpack(packed.codes[:, :, : body.blocks], packed.bits, packed.size, kind, packed.layout)
    levels = packed.levels.to(dtype) * packed.unit
    codes = codes.flatten(2, 3)
    out = levels.index_select(0, codes.flatten().int()).view(codes.shape)
    scale, zero = packed.scale, packed.zero
    if kind == "value":
        scale, zero = (x[:, : body.blocks].flatten(1)[:, None, :, None] for x in (scale, zero))
    elif body.group:
        length = out.shape[2]
        scale, zero = (x.repeat_interleave(body.group, 2)[:, :, :length] for x in (scale, zero))
    out.mul_(scale.to(dtype)).add_(zero.to(dtype))
    return out if packed.outliers is None else out + unpack_outliers(packed, body.blocks).to(dtype)


def attend(
    q: Tensor,
    body: Body,
    exact_key: Tensor,
    exact_value: Tensor,
    exact_mask: Tensor,
    first: Tensor,
    sinks: Tensor,
    scale: float,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Attend rotated q [B, Hq, S, D] to the body and to exact tokens; out [B, Hq, S, Dv].

    exact_key, exact_value: rotated [B, H, E, D], [B, H, E, Dv]; exact_mask: float32 [B, S, E],
    added. Query s of row b sees the body tokens from first[b, s] (int32 [B, S]) on.
    sinks: float32 [Hq], an extra column of the softmax, -inf for none. Computed in dtype.
    """
    groups = q.shape[1] // exact_key.shape[1]
    keys, values = dequantize(body, "key", dtype), dequantize(body, "value", dtype)
    if body.table is not None:
        cos, sin = unpack_table(body.table[:, : body.blocks], body.key.layout)
        keys = rotate(keys, cos.to(dtype), sin.to(dtype))
    keys = torch.cat((keys, exact_key.to(dtype)), 2).repeat_interleave(groups, 1)
    values = torch.cat((values, exact_value.to(dtype)), 2).repeat_interleave(groups, 1)
    seen = torch.arange(body.blocks * BLOCK, device=q.device) >= first.unsqueeze(-1)
    mask = torch.cat((torch.where(seen, 0.0, float("-inf")), exact_mask), -1).unsqueeze(1)
    scores = q.to(dtype) @ keys.mT * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask.to(dtype)
    column = sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch._safe_softmax(torch.cat((scores, column), -1), -1)[..., :-1]
    return (weights @ values).to(q.dtype)


def _scale_and_zero(minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    limit = torch.finfo(torch.float16).max
    zero = ((maximum.float() + minimum.float()) / 2).clamp(-limit, limit).half()
    return ((maximum.float() - minimum.float()) / 2).clamp(max=limit).half(), zero


def residuals(x: Tensor, read: Tensor, chosen: Tensor) -> Tensor:
    """float16 x - read where chosen, else 0."""
    limit = torch.finfo(torch.float16).max
    residual = (x.float() - read).clamp(-limit, limit).half()
    return torch.where(chosen, residual, torch.zeros_like(residual))
