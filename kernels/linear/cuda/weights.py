"""What a lane holds of packed weights: codes as operands of the tensor cores, scales as floats.

The lane 4 * g + q has ``channels`` neighbouring channels by g and a quarter of a block's columns by
q. Codes become numbers of half precision by a few bits in front of them, which add an ``offset``;
it is taken off the sums of products, which are exact up to float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from regraft.kernels.device import Expr, address, call, let, wide, wide_row
from regraft.kernels.linear.formats import HALVES, ROWS, SUPER, Format, parse

Pair = tuple[Expr, Expr]


@dataclass(frozen=True)
class Place:
    """Where a lane is: its g and q and the first of its block's tiles, of ``size`` bytes each."""

    g: Expr
    q: Expr
    tile: Expr
    channels: Expr
    size: Expr


def weights(format: str, dtype: str, packed: Any, columns: Expr, place: Place, tiles: int) -> Any:
    """Those of a block of threads for ``tiles`` tiles, 1 or 2."""
    if format in HALVES:
        return Halves(packed, columns, place)
    kind = parse(format)
    made = {4: Four, 6: Six, 8: Eight}[kind.bits]
    return made(kind, dtype, packed, columns, place, tiles)


class Halves:
    """Plain matrices: a lane has eight columns of channels g and g + 8."""

    block, words, channels = 32, 8, 2
    scaled = False

    def __init__(self, packed: Any, columns: Expr, place: Place) -> None:
        self.packed, self.q = packed, place.q
        rows = [T.min(place.tile * ROWS + place.g + 8 * e, place.channels - 1) for e in range(2)]
        self.starts = [let(wide_row(row) * wide(columns) + wide(8 * place.q)) for row in rows]

    def channel(self, place: int, g: Expr) -> Expr:
        return g + 8 * place

    def unit(self, block: Expr) -> list[Expr]:
        """Where what is loaded from this block on lies."""
        return [let(start + wide(block * self.block)) for start in self.starts]

    def load(self, ring: Any, at: int, unit: list[Expr], slot: int, valid: Expr) -> None:
        for e, start in enumerate(unit):
            source = address(self.packed, start + slot * self.block)
            call("stream16", address(ring, at + 4 * e), source, valid)

    def prefetch(self, block: Expr, depth: int, valid: Expr) -> None:
        """Ask for the lines of ``depth`` blocks."""
        for start in self.unit(block):
            own = T.And(valid, self.q < depth // 2)
            call("prefetch", address(self.packed, start + wide(56 * self.q)), T.cast(own, "int32"))

    def steps(self, ring: Any, at: int) -> Iterator[list[list[Expr]]]:
        for k in range(2):
            first, second = at + 2 * k, at + 4 + 2 * k
            yield [[ring[first], ring[second], ring[first + 1], ring[second + 1]]]

    def activations(self, words: Any) -> tuple[list[Pair], list[Pair]]:
        return [(words[0], words[1]), (words[2], words[3])], []

    def load_activations(self, words: Any, x: Any, start: Expr) -> None:
        call("given16", address(words, 0), address(x, start + wide(8 * self.q)))


class Four:
    """Codes of four bits: a word is eight columns of a channel."""

    block, code_words = 32, 1
    # the bits of a word that become numbers, those put before them, and what these add
    magic = {"bfloat16": (0x000F000F, 0x43004300, 128), "float16": (0x00F000F0, 0x54005400, 64)}
    scaled = True

    def __init__(
        self, format: Format, dtype: str, packed: Any, columns: Expr, place: Place, tiles: int
    ) -> None:
        self.format, self.dtype, self.packed = format, dtype, packed
        self.g, self.q, self.tiles, self.channels = place.g, place.q, tiles, 2 * tiles
        last = (place.channels - 1) // ROWS
        own = place.tile if tiles == 1 else T.min(place.tile + place.g // 4, last)
        self.base = let(wide_row(own) * wide(place.size))
        self.first = let(place.g * 2 if tiles == 1 else place.g % 4 * 4)
        self.record = format.record(format.group or self.block)
        self.mask, self.bits, offset = self.magic[dtype]
        self.offset = offset + format.middle
        self.parts = len(format.kinds)
        self.words = self.channels * self.code_words + self.parts * self._part_words()
        self.ends = let(self.base + wide(columns * ROWS))
        self.share = format.group // self.block if format.group else 1
        self.bytes = self.block * ROWS * format.bits // 8
        self.width = 1 if format.nested else 2
        self.lane = let(self._lane())

    def _lane(self) -> Expr:
        """Where in a block the lane's codes lie."""
        return self.q * (4 * ROWS) + 4 * self.first

    def _part_words(self) -> int:
        """Words of a part's scales: halves, or bytes and the halves they share."""
        halves = self.channels // 2
        return (1 + halves) if self.format.nested else halves

    def channel(self, place: int, g: Expr) -> Expr:
        return g * self.channels + place

    # memory

    def unit(self, block: Expr) -> list[Expr]:
        """Where what is loaded from this block on lies; a multiple of ``depth``."""
        format, inner, outer = self.format, sum(self.record.values()), 0
        if not format.group:
            start = block * self.record["codes"]
        elif format.nested:
            many, outer = SUPER // format.group, 2 * ROWS * self.parts
            start = block // many * (many * inner + outer) + block % many * inner
        else:
            start = block // self.share * inner
        own = let(self.base + wide(start))
        supers = self.base + wide(block // many * (many * inner + outer)) if outer else own
        return [
            let(own + wide(outer + self.lane)),
            let((own if format.group else self.ends) + wide(outer + self.width * self.first)),
            let(supers + wide(2 * self.first)),
        ]

    def load(self, ring: Any, at: int, unit: list[Expr], slot: int, valid: Expr) -> None:
        codes, scales, supers = unit
        inner = sum(self.record.values()) if self.format.group else self.record["codes"]
        start = slot // self.share * inner
        self._load_codes(ring, at, codes, start + slot % self.share * self.bytes, valid)
        at += self.channels * self.code_words
        start = start + self._codes_bytes() if self.format.group else 0
        for part in range(self.parts):
            own = scales + (start + part * ROWS * self.width)
            self._read(ring, at, own, self.channels * self.width, valid)
            if self.format.nested:
                own = supers + part * 2 * ROWS
                self._read(ring, at + 1, own, 2 * self.channels, valid)
            at += self._part_words()

    def _codes_bytes(self) -> int:
        return self.record["codes"] + self.record.get("high", 0)

    def prefetch(self, block: Expr, depth: int, valid: Expr) -> None:
        """Ask for the lines of ``depth`` blocks."""
        inner = sum(self.record.values()) if self.format.group else self.record["codes"]
        lines, lanes = -(-depth // self.share * inner // 128), 32 // self.tiles
        line = let((4 * self.g + self.q) % lanes)
        start = self.unit(block)[0] - wide(self.lane)
        for first in range(0, lines, lanes):
            own = T.And(valid, line + first < lines)
            source = address(self.packed, start + wide((line + first) * 128))
            call("prefetch", source, T.cast(own, "int32"))

    def _load_codes(self, ring: Any, at: int, codes: Expr, start: int, valid: Expr) -> None:
        size = 4 * self.channels
        for i in range(self.code_words):
            source = address(self.packed, codes + (start + i * (16 * ROWS)))
            call(f"stream{size}", address(ring, at + i * self.channels), source, valid)

    def _read(self, ring: Any, at: int, start: Expr, size: int, valid: Expr) -> None:
        call(f"held{size}", address(ring, at), address(self.packed, start), valid)

    # operands

    def _number(self, word: Expr) -> Expr:
        return call("and_or", word, T.uint32(self.mask), T.uint32(self.bits))

    def pairs(self, word: Expr) -> list[Expr]:
        """Columns (0, 2), (4, 6), (1, 3), (5, 7)."""
        if self.dtype == "bfloat16":
            return [self._number(_right(word, 4 * i)) for i in range(4)]
        return [self._number(_right(word, 4 * i - 4)) for i in range(4)]

    def steps(self, ring: Any, at: int) -> Iterator[list[list[Expr]]]:
        """By step of 16 columns, by pair of channels: the four operands."""
        for i in range(self.code_words):
            own = [self.pairs(ring[at + i * self.channels + c]) for c in range(self.channels)]
            for k in range(0, len(own[0]), 2):
                yield [
                    [own[c][k], own[c + 1][k], own[c][k + 1], own[c + 1][k + 1]]
                    for c in range(0, self.channels, 2)
                ]

    def load_activations(self, words: Any, x: Any, start: Expr) -> None:
        call("given16", address(words, 0), address(x, start + wide(8 * self.q)))

    def activations(self, words: Any) -> tuple[list[Pair], list[Pair]]:
        """By step: the two operands; and those whose sum is that of the activations."""
        a, b = _even_odd(words[0], words[1]), _even_odd(words[2], words[3])
        found = [(a[0], b[0]), (a[1], b[1])]
        return found, found

    # scales

    def scales(self, ring: Any, at: int) -> list[list[Expr]]:
        """By part: those of the lane's channels."""
        at += self.channels * self.code_words
        found = []
        for part in range(self.parts):
            start = at + part * self._part_words()
            if self.format.nested:
                outer = self._halves(ring, start + 1)
                own = [self._byte(ring[start], i) for i in range(self.channels)]
                sign = T.float32(-1 if part else 1)
                found.append([let(x * y * sign) for x, y in zip(own, outer, strict=True)])
            else:
                found.append(self._halves(ring, start))
        return found

    def _halves(self, ring: Any, at: int) -> list[Expr]:
        names = ("float_f16", "float_upper_f16")
        return [call(names[i % 2], ring[at + i // 2]) for i in range(self.channels)]

    def _byte(self, word: Expr, index: int) -> Expr:
        if not self.format.zero:
            word = word ^ T.uint32(0x80808080)
        float_ = call("permute", word, T.uint32(0x4B000000), T.uint32(0x7440 + index))
        return let(call("as_float", float_) - T.float32(2**23 if self.format.zero else 2**23 + 128))


class Eight(Four):
    """Codes of eight bits: a word is four columns of a channel.

    As bfloat16, with eight bits of precision, they are halved, and the upper halves meet
    activations sixteen times as large.
    """

    code_words = 2
    magic = {
        "bfloat16": (0x000F000F, 0x43004300, 17 * 128),
        "float16": (0x00FF00FF, 0x64006400, 1024),
    }

    def pairs(self, word: Expr) -> list[Expr]:
        step = 4 if self.dtype == "bfloat16" else 8
        return [self._number(_right(word, at)) for at in range(0, 16, step)]

    def load_activations(self, words: Any, x: Any, start: Expr) -> None:
        for i in range(2):
            own = start + wide(16 * i + 4 * self.q)
            call("given8", address(words, 2 * i), address(x, own))

    def activations(self, words: Any) -> tuple[list[Pair], list[Pair]]:
        both = [_even_odd(words[2 * i], words[2 * i + 1]) for i in range(2)]
        sums = [(a, b) for a, b in both]
        if self.dtype == "float16":
            return sums, sums
        return [(x, call("times16_bf16", x)) for pair in both for x in pair], sums


class Six(Four):
    """Codes of six bits: a step of four columns a lane, two bits apart from the other four."""

    block, code_words = 16, 2
    magic = {"bfloat16": (0x00FF00FF, 0x43004300, 128), "float16": (0x00FF00FF, 0x64006400, 1024)}

    def _lane(self) -> Expr:
        return self.q // 2 * (4 * ROWS) + 4 * self.first

    def _load_codes(self, ring: Any, at: int, codes: Expr, start: int, valid: Expr) -> None:
        size = 4 * self.channels
        high = codes + (start + self.record["codes"]) - wide(self.q // 2 * (4 * ROWS))
        for place, own in ((at, codes + start), (at + self.channels, high)):
            call(f"held{size}", address(ring, place), address(self.packed, own), valid)

    def steps(self, ring: Any, at: int) -> Iterator[list[list[Expr]]]:
        own = []
        for c in range(self.channels):
            low = ring[at + c] >> T.cast(self.q % 2 * 4, "uint32")
            high = ring[at + self.channels + c] >> T.cast(self.q * 2, "uint32")
            high = (high & T.uint32(0x03030303)) << T.uint32(4)
            code = let((low & T.uint32(0x0F0F0F0F)) | high)
            own.append([self._number(code), self._number(_right(code, 8))])
        yield [
            [own[c][0], own[c + 1][0], own[c][1], own[c + 1][1]] for c in range(0, self.channels, 2)
        ]

    def load_activations(self, words: Any, x: Any, start: Expr) -> None:
        call("given8", address(words, 0), address(x, start + wide(4 * self.q)))

    def activations(self, words: Any) -> tuple[list[Pair], list[Pair]]:
        found = [_even_odd(words[0], words[1])]
        return found, found


def _right(word: Expr, bits: int) -> Expr:
    if bits == 0:
        return word
    return word >> T.uint32(bits) if bits > 0 else word << T.uint32(-bits)


def _even_odd(a: Expr, b: Expr) -> Pair:
    """Of four halves those at 0 and 2, and at 1 and 3."""
    first = call("permute", a, b, T.uint32(0x5410))
    return first, call("permute", a, b, T.uint32(0x7632))
