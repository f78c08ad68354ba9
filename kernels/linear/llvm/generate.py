"""Products with packed weights: the kernels for processors.

Activations are rounded to 15 bits by blocks, as 128 * high + low of 8 and 7 bits: two integer
products whose sum is as good as one of floats, at the speed of memory. A tile of weights meets
all rows of activations before the next one is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.llvm.simd import (
    Expr,
    Floats,
    Registers,
    call,
    divided,
    get,
    load,
    local,
    loop,
    opaque,
    parallel,
    prefetch,
    put,
    store,
    suffix,
    tensor,
)
from regraft.kernels.linear.formats import ROWS, SUPER, parse
from regraft.kernels.linear.llvm.dots import LINE, dots, signed

LARGEST = 127 * 128
AHEAD = 1024
"""Bytes between what is read and what is asked for."""


@dataclass(frozen=True)
class Shape:
    """What a kernel is generated for; rows: activations that a tile of weights meets at once."""

    level: str
    format: str
    rows: int
    bias: bool


class _Weights:
    """The parts of records of the packed weights [tiles, bytes], by the byte a record starts at."""

    def __init__(self, level: str, format: str, packed: Any, columns: Expr) -> None:
        self.format, self.packed, self.columns = parse(format), packed, columns
        self.dots = dots(level, self.format.bits)
        self.block_bytes = ROWS * self.format.block // (1 if self.format.bits == 8 else 2)
        nested = self.format.nested
        self.outer = 2 * ROWS * len(self.format.kinds) if nested else 0
        self.sizes = self.format.record(self.format.group) if self.format.group else {}
        *starts, self.record = accumulate(self.sizes.values(), initial=0)
        self.starts = dict(zip(self.sizes, starts, strict=True))

    def groups(self, unit: int) -> Expr:
        return divided(self.columns, unit)[0]

    def steps(self, tile: Expr, half: Expr, at: Expr) -> Iterator[Expr]:
        """The codes of a block's steps, as int32 [lanes] of four bytes."""
        d = self.dots

        def line(start: Expr) -> Expr:
            x = load(self.packed, tile, start + half * (4 * d.lanes), lanes=4 * d.lanes)
            return T.Bind(T.reinterpret(d.ints, x))

        if self.format.bits == 8:
            yield from (line(at + i * LINE) for i in range(self.block_bytes // LINE))
            return
        high = line(at + self.starts["high"]) if self.format.bits == 6 else None
        for i in range(self.block_bytes // LINE):
            both = line(at + i * LINE)
            for side in (0, 1):
                codes = d.mask(d.shift(both, 4 * side), 15)
                if high is not None:
                    upper = d.mask(d.shift(high, 4 * i + 2 * side - 4), 48)
                    codes = T.Bind(T.bitwise_or(codes, upper))
                yield codes

    def ahead(self, tile: Expr, at: Expr, size: int) -> None:
        """Ask for what will be read later; processors follow no further than a page."""
        for start in range(0, size, LINE):
            prefetch(self.packed, tile, at + (AHEAD + start))

    def halves(self, tile: Expr, half: Expr, at: Expr) -> Expr:
        """Float32 of float16 [lanes]."""
        lanes = self.dots.lanes
        x = load(self.packed, tile, at + half * (2 * lanes), lanes=2 * lanes)
        x = T.reinterpret(f"float16x{lanes}", x)
        return T.Bind(T.Cast(f"float32x{lanes}", x))

    def of_group(self, kind: str, tile: Expr, half: Expr, at: Expr, outer: Expr) -> Expr:
        """A group's scale or zero; outer: what multiplies it where nested."""
        at = at + self.starts[kind]
        if not self.format.nested:
            return self.halves(tile, half, at)
        lanes, signed_ = self.dots.lanes, not self.format.zero
        x = load(self.packed, tile, at + half * lanes, lanes=lanes)
        x = T.reinterpret(f"int8x{lanes}", x) if signed_ else x
        return T.Bind(T.Cast(f"float32x{lanes}", T.Cast(f"int32x{lanes}", x)) * outer)

    def supers(self, tile: Expr, half: Expr, at: Expr) -> dict[str, Expr]:
        """{scale, zero: their outer factor}."""
        found = {"scale": self.halves(tile, half, at)}
        if self.format.zero:
            zero = self.halves(tile, half, at + 2 * ROWS)
            found["zero"] = T.Bind(self.dots.floats.of(0.0) - zero)
        return found

    def each_group(self, tile: Expr, half: Expr, visit: Callable[..., None]) -> None:
        """visit(group, byte where its record starts, outer factors)."""
        if not self.format.nested:
            with loop(self.groups(self.format.group)) as group:
                visit(group, T.Bind(group * self.record), {})
            return
        share = SUPER // self.format.group
        with loop(self.groups(SUPER)) as index:
            at = T.Bind(index * (share * self.record + self.outer))
            outer = self.supers(tile, half, at)
            with loop(share) as inner:
                start = T.Bind(at + self.outer + inner * self.record)
                visit(T.Bind(index * share + inner), start, outer)


def make(shape: Shape) -> Any:
    """The PrimFunc ``packed_linear``: out = x times the weights, plus bias."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("packed_linear")
            rows, columns, tiles, channels, padded, blocks = (T.int64() for _ in range(6))
            block = parse(shape.format).block
            x = tensor("x", (rows, columns), "float32")
            packed = tensor("packed", (tiles, T.int64()), "uint8")
            out = tensor("out", (rows, channels), "float32")
            bias = tensor("bias", (channels,), "float32") if shape.bias else None
            digits = tensor("digits", (padded, blocks, 2, block), "int8")
            middles = tensor("middles", (padded, blocks), "int32")
            units = tensor("units", (padded, blocks), "float32")
            totals = tensor("totals", (padded, blocks), "float32")
            kernel = _Linear(shape, packed, columns, (digits, middles, units, totals))
            with loop(padded) as row, loop(kernel.weights.groups(block)) as b:
                kernel.round(x, opaque(T.min(row, rows - 1)), row, b)
            lanes = kernel.dots.lanes
            turns = opaque(T.truncdiv(padded, T.int64(shape.rows)))
            with parallel(tiles) as tile, loop(ROWS // lanes) as half, loop(turns) as turn:
                sums = kernel.sums(tile, half, T.Bind(turn * shape.rows))
                channel = T.Bind(tile * ROWS + half * lanes)
                for r in range(shape.rows):
                    row = T.Bind(turn * shape.rows + r)
                    with T.If(row < rows), T.Then():
                        kernel.store(out, bias, row, channel, channels, sums[r])
    return builder.get().with_attr("global_symbol", "packed_linear")


class _Linear:
    def __init__(self, shape: Shape, packed: Any, columns: Expr, scratch: tuple[Any, ...]) -> None:
        self.shape, self.weights = shape, _Weights(shape.level, shape.format, packed, columns)
        self.format, self.dots = self.weights.format, self.weights.dots
        self.floats: Floats = self.dots.floats
        self.digits, self.middles, self.units, self.totals = scratch

    def round(self, x: Any, source: Expr, row: Expr, block: Expr) -> None:
        """A block of activations as two digits and their unit; not a number stays one."""
        floats, lanes, size = self.floats, self.dots.lanes, self.format.block
        vectors = [
            load(x, source, block * size + i, lanes=lanes) for i in range(0, size, lanes)
        ]  # fmt: skip
        top, nothing = floats.of(0.0), floats.of(0.0)
        for v in vectors:
            top = floats.max(top, floats.abs(v))
            nothing = floats.fma(v, floats.of(0.0), nothing)
        poison = call("float32", f"llvm.vector.reduce.fadd.{suffix(floats.dtype)}",
                      T.float32(0), nothing)  # fmt: skip
        largest = floats.largest(top)
        inverse = T.Select(largest > T.float32(0), T.float32(LARGEST) / largest, T.float32(0))
        inverse = T.Bind(T.min(inverse, T.float32(3e38)))
        total = self.dots.fill(0)
        for i, v in enumerate(vectors):
            whole = T.Bind(T.Cast(self.dots.ints, floats.round(v * floats.of(inverse))))
            high = T.Bind(T.shift_right(whole + self.dots.fill(64), self.dots.fill(7)))
            low = whole - T.shift_left(high, self.dots.fill(7))
            for digit, part in enumerate((high, low)):
                narrow = T.Cast(f"int8x{lanes}", part)
                store(self.digits, narrow, row, block, digit, i * lanes, lanes=lanes)
            total = T.Bind(total + whole)
        total = call("int32", f"llvm.vector.reduce.add.{suffix(self.dots.ints)}", total)
        unit = T.Bind(largest / T.float32(LARGEST) + poison)
        middle = 0 if signed(self.shape.level, self.format.bits) else self.format.middle
        put(self.units, unit, row, block)
        put(self.totals, unit * T.Cast("float32", total), row, block)
        put(self.middles, total * T.int32(-middle), row, block)

    def sums(self, tile: Expr, half: Expr, row: Expr) -> Registers:
        """Float32 [lanes] for each of the rows from ``row`` on."""
        w, floats, rows = self.weights, self.floats, self.shape.rows
        sums = Registers(rows, "float32", self.dots.lanes)
        if self.format.group:
            w.each_group(tile, half, partial(self._group, tile, half, row, sums))
            return sums
        blocks = w.groups(self.format.block)
        with loop(blocks) as block:
            at = T.Bind(block * w.block_bytes)
            w.ahead(tile, at, w.block_bytes)
            for r, (part, unit) in enumerate(self._block(tile, half, row, block, at)):
                sums[r] = floats.fma(part, floats.of(unit), sums[r])
        scale = w.halves(tile, half, blocks * w.block_bytes)
        for r in range(rows):
            sums[r] = T.Bind(sums[r] * scale)
        return sums

    def _group(
        self, tile: Expr, half: Expr, row: Expr, sums: Registers, group: Expr, at: Expr,
        outer: dict[str, Expr],
    ) -> None:  # fmt: skip
        w, floats = self.weights, self.floats
        w.ahead(tile, at, w.record)
        scale = w.of_group("scale", tile, half, at, outer.get("scale"))
        zero = None
        if self.format.zero:
            zero = w.of_group("zero", tile, half, at, outer.get("zero"))
        share = self.format.group // self.format.block
        parts: list[Any] = [None] * self.shape.rows
        totals: list[Any] = [None] * self.shape.rows
        for i in range(share):
            block = T.Bind(group * share + i)
            start = at + i * w.block_bytes
            for r, (part, unit) in enumerate(self._block(tile, half, row, block, start)):
                if parts[r] is None:
                    parts[r] = T.Bind(part * floats.of(unit))
                else:
                    parts[r] = floats.fma(part, floats.of(unit), parts[r])
                total = get(self.totals, row + r, block)
                totals[r] = total if totals[r] is None else totals[r] + total
        for r in range(self.shape.rows):
            if zero is not None:
                sums[r] = floats.fma(zero, floats.of(T.Bind(totals[r])), sums[r])
            sums[r] = floats.fma(parts[r], scale, sums[r])

    def _block(
        self, tile: Expr, half: Expr, row: Expr, block: Expr, at: Expr
    ) -> list[tuple[Expr, Expr]]:
        """Sums of a block's products and the unit they come in, by row."""
        d, rows = self.dots, range(self.shape.rows)
        sums = [[d.nothing(), d.nothing()] for _ in rows]
        for step, codes in enumerate(self.weights.steps(tile, half, at)):
            for r in rows:
                for digit in (0, 1):
                    x = load(self.digits, row + r, block, digit, 4 * step, lanes=4)
                    word = T.Bind(T.reinterpret("int32", x))
                    sums[r][digit] = d.add(sums[r][digit], codes, word)
        found = []
        for r in rows:
            high, low = map(d.total, sums[r])
            middle = d.fill(get(self.middles, row + r, block))
            whole = T.shift_left(high, d.fill(7)) + low + middle
            unit = T.Bind(get(self.units, row + r, block))
            found.append((T.Bind(T.Cast(self.floats.dtype, whole)), unit))
        return found

    def store(
        self, out: Any, bias: Any, row: Expr, channel: Expr, channels: Expr, sums: Expr
    ) -> None:
        """Write a vector of channels, or those of it that there are."""
        lanes = self.dots.lanes
        with T.If(channel + lanes <= channels):
            with T.Then():
                whole = sums if bias is None else sums + load(bias, channel, lanes=lanes)
                store(out, whole, row, channel, lanes=lanes)
            with T.Else():
                kept = local((lanes,))
                store(kept, sums, 0, lanes=lanes)
                with loop(opaque(T.max(channels - channel, T.int64(0)))) as i:
                    more = get(bias, channel + i) if bias is not None else T.float32(0)
                    put(out, get(kept, i) + more, row, channel + i)


def make_unpack(level: str, format: str) -> Any:
    """The PrimFunc ``unpack``: tiles from ``first`` on as float32 [columns, channels]."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("unpack")
            columns, width = T.int64(), T.int64()
            packed = tensor("packed", (T.int64(), T.int64()), "uint8")
            out = tensor("out", (columns, width), "float32")
            first = T.arg("first", T.int64())
            weights = _Weights(level, format, packed, columns)
            lanes = weights.dots.lanes
            with parallel(divided(width, ROWS)[0]) as tile, loop(ROWS // lanes) as half:
                channel = T.Bind(tile * ROWS + half * lanes)
                _unpack(weights, T.Bind(first + tile), half, out, channel)
    return builder.get().with_attr("global_symbol", "unpack")


def _unpack(w: _Weights, tile: Expr, half: Expr, out: Any, channel: Expr) -> None:
    d, format = w.dots, w.format

    def write(at: Expr, column: Expr, scale: Expr, zero: Expr) -> None:
        for step, codes in enumerate(w.steps(tile, half, at)):
            for i in range(4):
                byte = T.bitwise_and(d.shift(codes, 8 * i), d.fill(255))
                code = T.Cast(d.floats.dtype, byte - d.fill(format.middle))
                value = d.floats.fma(code, scale, zero)
                store(out, value, column + (4 * step + i), channel, lanes=d.lanes)

    def group(index: Expr, at: Expr, outer: dict[str, Expr]) -> None:
        scale = w.of_group("scale", tile, half, at, outer.get("scale"))
        zero = d.floats.of(0.0)
        if format.zero:
            zero = w.of_group("zero", tile, half, at, outer.get("zero"))
        for i in range(format.group // format.block):
            column = index * format.group + i * format.block
            write(at + i * w.block_bytes, column, scale, zero)

    if format.group:
        return w.each_group(tile, half, group)
    blocks = w.groups(format.block)
    scale = w.halves(tile, half, blocks * w.block_bytes)
    with loop(blocks) as block:
        write(T.Bind(block * w.block_bytes), block * format.block, scale, d.floats.of(0.0))
