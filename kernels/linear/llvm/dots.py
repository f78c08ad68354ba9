"""Products of unsigned codes with signed bytes of activations, summed by fours, by processor.

A line is 16 channels of four codes; ``lanes`` of its channels are a vector of int32. Codes of up
to 6 bits meet activations of 7 and 8 bits without overflow of the 16-bit sums of AVX2.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.llvm.simd import Expr, Floats, call, fill

LINE = 64


class Dots:
    """Vectors of int32 by generic code."""

    lanes = 8

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.floats = Floats(self.lanes)
        self.ints, self.bytes = f"int32x{self.lanes}", f"int8x{4 * self.lanes}"

    def fill(self, value: int | Expr) -> Expr:
        return fill(value, "int32", self.lanes)

    def shift(self, x: Expr, right: int) -> Expr:
        """Logical; to the left where ``right`` is negative."""
        if right == 0:
            return x
        if right < 0:
            return T.Bind(T.shift_left(x, self.fill(-right)))
        dtype = f"uint32x{self.lanes}"
        moved = T.shift_right(T.reinterpret(dtype, x), fill(right, "uint32", self.lanes))
        return T.Bind(T.reinterpret(self.ints, moved))

    def mask(self, x: Expr, byte: int) -> Expr:
        return T.Bind(T.bitwise_and(x, self.fill(byte * 0x1010101)))

    def nothing(self) -> Expr:
        """Sums to start from."""
        return T.Bind(self.fill(0))

    def add(self, total: Expr, codes: Expr, word: Expr) -> Expr:
        """total + the products of the four codes of each channel and the four bytes of word."""
        for i in range(4):
            code = T.bitwise_and(self.shift(codes, 8 * i), self.fill(255))
            factor = T.shift_right(T.shift_left(word, T.int32(24 - 8 * i)), T.int32(24))
            total = T.Bind(total + code * self.fill(factor))
        return total

    def total(self, sums: Expr) -> Expr:
        """Sums as int32."""
        return sums


class Dots256(Dots):
    """AVX2: pairs of products in 16 bits."""

    @property
    def narrow(self) -> bool:
        """Whether a block's sums fit in 16 bits: 8 * 2 * 15 * 127 < 2**15."""
        return self.bits == 4

    def _pairs(self, name: str, dtype: str, a: Expr, b: Expr) -> Expr:
        return call(dtype, f"llvm.x86.avx2.{name}", a, b)

    def nothing(self) -> Expr:
        return T.Bind(fill(0, "int16", 16)) if self.narrow else super().nothing()

    def add(self, total: Expr, codes: Expr, word: Expr) -> Expr:
        a = T.reinterpret(self.bytes, codes)
        b = T.reinterpret(self.bytes, self.fill(word))
        if self.bits == 8:
            a = T.Bind(T.bitwise_xor(a, fill(-128, "int8", 32)))
            b = self._pairs("psign.b", self.bytes, b, a)
            a = call(self.bytes, "llvm.abs.v32i8", a, T.bool(False))
        pairs = self._pairs("pmadd.ub.sw", "int16x16", a, b)
        return T.Bind(total + (pairs if self.narrow else self._widened(pairs)))

    def total(self, sums: Expr) -> Expr:
        return self._widened(sums) if self.narrow else sums

    def _widened(self, pairs: Expr) -> Expr:
        return self._pairs("pmadd.wd", self.ints, pairs, fill(1, "int16", 16))


class Dots512(Dots):
    """AVX-512 with VNNI."""

    lanes = 16

    def add(self, total: Expr, codes: Expr, word: Expr) -> Expr:
        a = T.reinterpret("uint8x64", codes)
        b = T.reinterpret(self.bytes, self.fill(word))
        return call(self.ints, "llvm.x86.avx512.vpdpbusd.512", total, a, b)


def dots(level: str, bits: int) -> Any:
    return {"avx512": Dots512, "avx2": Dots256}.get(level, Dots)(bits)


def signed(level: str, bits: int) -> bool:
    """Whether ``add`` itself counts codes from the middle."""
    return level == "avx2" and bits == 8
