"""How packed weights lie in memory, and what they stand for.

A tile is ROWS output channels, a record a group of columns. It holds the codes by steps of four
columns, the channels of a step side by side (the order in which one instruction multiplies them),
then scales and zeros of the channels: memory is read in one stream. Codes are unsigned; those of
formats without zeros count from the middle.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from regraft.program import RegraftError

ROWS, SUPER = 16, 256
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""Formats that are plain matrices [out, in]."""


@dataclass(frozen=True)
class Format:
    """weight = scale * (code - middle), or scale * code + zero.

    bits: 4, 6 or 8; group: columns that share a scale, 0 for all. nested: scale and zero are
    8-bit integers times a float16 (zero: minus one) that SUPER columns share.
    """

    bits: int
    group: int
    zero: bool = False
    nested: bool = False

    @property
    def name(self) -> str:
        group = f"g{self.group}" if self.group else ""
        return f"int{self.bits}{group}{'z' * self.zero}{'n' * self.nested}"

    @property
    def middle(self) -> int:
        return 0 if self.zero else 1 << (self.bits - 1)

    @property
    def block(self) -> int:
        """Columns whose products are summed as integers; activations share a scale in them."""
        return 16 if self.group == 16 else 32

    def groups(self, columns: int) -> int:
        return columns // self.group if self.group else 1

    def padded(self, columns: int) -> int:
        """Columns with the ones that are filled up; RegraftError where groups do not divide."""
        unit = SUPER if self.nested else self.group
        if unit and columns % unit:
            raise RegraftError(f"{columns} columns do not divide into groups of {unit}")
        return -(-columns // self.block) * self.block

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("scale", "zero") if self.zero else ("scale",)

    def record(self, columns: int) -> dict[str, int]:
        """{part: bytes} of a group, in order; where nested, records follow the super parts."""
        width = self.group or self.padded(columns)
        sizes = {"codes": width * ROWS // (1 if self.bits == 8 else 2)}
        if self.bits == 6:
            sizes["high"] = width * ROWS // 4
        return sizes | dict.fromkeys(self.kinds, ROWS if self.nested else 2 * ROWS)

    def tile_bytes(self, columns: int) -> int:
        self.padded(columns)
        size = sum(self.record(columns).values()) * self.groups(columns)
        supers = columns // SUPER * 2 * ROWS * len(self.kinds) if self.nested else 0
        return -(-(size + supers) // 64) * 64


@cache
def parse(name: str) -> Format:
    """The format of this name; RegraftError for others."""
    found = re.fullmatch(r"int([468])(?:g(\d{1,6}))?(z?)(n?)", name)
    if not found:
        raise RegraftError(f"unknown format of packed weights {name!r}")
    bits, group, zero, nested = found.groups()
    made = Format(int(bits), int(group or 0), bool(zero), bool(nested))
    blocks = (16,) if made.bits == 6 else (0, 32, 64, 128)
    if made.group not in blocks or (made.nested and made.group not in (16, 32)):
        raise RegraftError(f"unknown format of packed weights {name!r}")
    return made


def check(packed: Tensor, format: str, rows: int, columns: int) -> None:
    """RegraftError unless packed holds weights [rows, columns] of this format."""
    shape, dtype = _expected(format, rows, columns)
    if packed.shape != shape or packed.dtype != dtype or not packed.is_contiguous():
        raise RegraftError(
            f"packed weights [{rows}, {columns}] in {format} are {dtype} {list(shape)}, "
            f"got {packed.dtype} {list(packed.shape)}"
        )


@lru_cache(256)
def _expected(format: str, rows: int, columns: int) -> tuple[tuple[int, int], torch.dtype]:
    if format in HALVES:
        return (rows, columns), HALVES[format]
    return (-(-rows // ROWS), parse(format).tile_bytes(columns)), torch.uint8


def pack(format: Format, codes: Tensor, **parts: Tensor) -> Tensor:
    """uint8 [tiles, bytes] of codes uint8 [rows, columns] and their scale, zero [rows, groups]
    (float16, or 8-bit where nested), super_scale and super_zero [rows, columns / SUPER]."""
    rows, columns = codes.shape
    tiles, padded = -(-rows // ROWS), format.padded(columns)
    whole = codes.new_full((tiles * ROWS, padded), format.middle)
    whole[:rows, :columns] = codes
    steps = whole.view(tiles, ROWS, padded // 4, 4).transpose(1, 2)
    filled = {"codes": steps}
    if format.bits != 8:
        pairs = (steps & 15).unflatten(1, (-1, 2))
        filled["codes"] = pairs[:, :, 0] | pairs[:, :, 1] << 4
    if format.bits == 6:
        fours = (steps >> 4).unflatten(1, (-1, 4))
        filled["high"] = sum(fours[:, :, i] << 2 * i for i in range(1, 4)) | fours[:, :, 0]
    for name, part in parts.items():
        wide = part.new_zeros(tiles * ROWS, part.shape[1])
        wide[:rows] = part
        filled[name] = wide.view(tiles, ROWS, -1).transpose(1, 2).contiguous().view(torch.uint8)
    groups, size = format.groups(columns), format.tile_bytes(columns)
    records = [filled[name].reshape(tiles, groups, -1) for name in format.record(columns)]
    if format.nested:
        supers = columns // SUPER
        outer = [filled[f"super_{kind}"].reshape(tiles, supers, -1) for kind in format.kinds]
        records = [*outer, torch.cat(records, 2).view(tiles, supers, -1)]
    out = codes.new_zeros(tiles, size)
    body = torch.cat(records, 2).flatten(1)
    out[:, : body.shape[1]] = body
    return out


def unpack(packed: Tensor, format: Format, columns: int) -> tuple[Tensor, dict[str, Tensor]]:
    """What ``pack`` took, rows filled up to whole tiles."""
    tiles, padded, record = packed.shape[0], format.padded(columns), format.record(columns)
    groups, inner = format.groups(columns), sum(record.values())
    parts: dict[str, Tensor] = {}
    if format.nested:
        supers, step = columns // SUPER, 2 * ROWS
        size = inner * SUPER // format.group
        body = packed[:, : supers * (size + step * len(format.kinds))].view(tiles, supers, -1)
        for i, kind in enumerate(format.kinds):
            parts[f"super_{kind}"] = body[:, :, i * step : (i + 1) * step]
        body = body[:, :, len(format.kinds) * step :].reshape(tiles, groups, inner)
    else:
        body = packed[:, : groups * inner].view(tiles, groups, inner)
    parts |= zip(record, body.split(list(record.values()), 2), strict=True)
    lines = parts.pop("codes").reshape(tiles, -1, ROWS, 4)
    steps = lines
    if format.bits != 8:
        steps = torch.stack((lines & 15, lines >> 4), 2).flatten(1, 2)
    if format.bits == 6:
        high = parts.pop("high").reshape(tiles, -1, ROWS, 4)
        steps = steps | (torch.stack([high >> 2 * i & 3 for i in range(4)], 2).flatten(1, 2) << 4)
    whole = steps.transpose(1, 2).reshape(tiles * ROWS, padded)[:, :columns]
    found = {}
    for name, part in parts.items():
        part = part.contiguous()
        if not format.nested or name.startswith("super"):
            part = part.view(torch.float16)
        elif not format.zero:
            part = part.view(torch.int8)
        found[name] = part.reshape(tiles, -1, ROWS).transpose(1, 2).reshape(tiles * ROWS, -1)
    return whole, found


def dequantize(packed: Tensor, format: str, rows: int, columns: int) -> Tensor:
    """float32 [rows, columns]."""
    if format in HALVES:
        return packed.float()
    kind = parse(format)
    return values(kind, *unpack(packed, kind, columns))[:rows]


def values(format: Format, codes: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """float32 [rows, columns] of codes [rows, columns] and parts [rows, groups]."""
    scale, zero = parts["scale"].float(), parts["zero"].float() if format.zero else None
    if format.nested:
        share = SUPER // format.group
        scale = scale * parts["super_scale"].float().repeat_interleave(share, 1)
        if zero is not None:
            zero = -zero * parts["super_zero"].float().repeat_interleave(share, 1)
    levels = (codes.float() - format.middle).unflatten(1, (scale.shape[1], -1))
    found = levels * scale.unsqueeze(2)
    return (found if zero is None else found + zero.unsqueeze(2)).flatten(1)
