"""Codes on CUDA: loading them, and looking up the levels of two at a time."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from regraft.kernels.attention.flash import Warp
from regraft.kernels.device import (
    Expr,
    address,
    call,
    let,
    load_words,
    registers,
    store,
    wide,
    wide_row,
)
from regraft.kernels.kvquant.cuda.plan import Case, Layout
from regraft.kernels.kvquant.layout import BLOCK, PLANES, load_bytes


class Codes:
    """The part of ``Attend`` that reads codes."""

    case: Case
    layout: Layout
    warp: Warp
    a: Any
    thread: Any
    shared: Any
    line: Any
    entry: Any
    table_place: Any

    def _load_levels(self) -> None:
        """Load the level of code lane % 2**bits, for ``_share_levels``."""
        case, a = self.case, self.a
        self.level = registers(2)
        for side, (kind, bits, unit) in enumerate(
            (("key", case.key_bits, a.key_unit), ("value", case.value_bits, a.value_unit))
        ):
            level = a.levels[kind][self.warp.lane % 2**bits]
            store(self.level, side, T.cast(level, "float32") * unit)

    def _share_levels(self) -> None:
        """Fill the look-up table: an entry is 64 words, 32 copies for keys, 32 for values."""
        threads = self.layout.warps * 32
        for side, bits in enumerate((self.case.key_bits, self.case.value_bits)):
            count = 4**bits * 8
            with T.serial(0, (count + threads - 1) // threads) as i:
                at = let(i * threads + self.thread)
                with T.If(at < count), T.Then():
                    entry = let(at // 8)
                    levels = [
                        call("from_lane", self.level[side], code)
                        for code in self._pair_codes(entry, bits)
                    ]
                    pair = call("pack_f16", *levels)
                    place = self.table_place + entry * 256 + side * 128 + at % 8 * 16
                    call("write16", address(self.shared, place), pair, pair, pair, pair)

    def _pair_codes(self, entry: Expr, bits: int) -> tuple[Expr, Expr]:
        if bits == 3:
            low = let(entry % 4 + entry // 16 % 2 * 4)
            return low, let(entry // 4 % 4 + entry // 32 * 4)
        return let(entry % 2**bits), let(entry // 2**bits)

    def _look_up(self, kind: str, words: Any, pair: int) -> Expr:
        """The two levels of a pair of codes, as float16."""
        bits = self.case.key_bits if kind == "key" else self.case.value_bits
        if bits == 4:
            at = call("permute", words[pair // 4], self.entry, T.uint32(0x7604 | pair % 4 << 4))
        else:
            at = _shift(words[pair // 8], 8 - pair % 8 * 4) & T.uint32(0xF00) | self.entry
            if bits == 3:
                word = words[-(-self._size(kind) * 2 // 32) + pair // 16]
                at = at | _shift(word, 12 - pair % 16 * 2) & T.uint32(0x3000)
        return call("look_up" if kind == "key" else "look_up_second", at)

    def _size(self, kind: str) -> int:
        return self.case.size if kind == "key" else self.case.value_size

    def _words(self, kind: str) -> int:
        bits = self.case.key_bits if kind == "key" else self.case.value_bits
        return sum(-(-self._size(kind) * width // 32) for width in PLANES[bits])

    def _load_codes(self, kind: str, words: Any, block: Expr) -> None:
        bits, size = getattr(self.case, f"{kind}_bits"), self._size(kind)
        base = let(wide_row(self.line * self.a.capacity + block) * (BLOCK * size * bits // 8))
        start = place = 0
        for width in PLANES[bits]:
            each = size * width // 8
            step = load_bytes(size, width)
            for chunk in range(each // step):
                at = base + wide(start + chunk * 32 * step + self.warp.lane * step)
                load_words(words, place * 4 + chunk * step, self.a.codes[kind], at, step)
            start += 32 * each
            place += -(-each // 4)


def _shift(word: Expr, left: int) -> Expr:
    return word << T.uint32(left) if left >= 0 else word >> T.uint32(-left)
