"""Quantising and packing blocks of 32 tokens: the kernels for processors.

A task is one block of one sequence, all heads: choose each token's outliers, write its codes, then
the outliers' residuals in order. Numbers are the reference's, bit for bit: the same operations on
float32 in the same order, none of them fused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.layout import PLANES
from regraft.kernels.kvquant.llvm.largest import Candidates, Largest, bound, count_of, kth
from regraft.kernels.kvquant.llvm.simd import (
    Expr,
    Floats,
    Registers,
    call,
    divided,
    fill,
    get,
    load,
    local,
    loop,
    opaque,
    parallel,
    put,
    store,
    suffix,
)

TOKENS, LANES = 32, 8
FLOATS = Floats(LANES)
HALF_MAX = 65504.0


@dataclass(frozen=True)
class Shape:
    """What a kernel is generated for; count: outliers of a token at most."""

    kind: str
    heads: int
    size: int
    bits: int
    count: int
    weighted: bool

    @property
    def width(self) -> int:
        """Channels of a token, in all heads."""
        return self.heads * self.size


def make(shape: Shape) -> Any:
    """The PrimFunc ``quantize``; its arguments are those of ``_arguments``, in order."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("quantize")
            a = _arguments(shape)
            with parallel(a.batch * a.blocks) as task:
                (_Keys if shape.kind == "key" else _Values)(shape, a, task).run()
    return builder.get().with_attr("global_symbol", "quantize")


class _Arguments:
    pass


def _arguments(shape: Shape) -> Any:
    a: Any = _Arguments()
    heads, size, count = shape.heads, shape.size, shape.count
    batch, blocks, scales, groups = (T.int64() for _ in range(4))
    a.batch, a.blocks, a.scales = batch, blocks, scales

    def tensor(name: str, dims: tuple[Any, ...], dtype: str, strides: Any = None) -> None:
        dims = tuple(T.int64(d) if isinstance(d, int) else d for d in dims)
        handle = T.arg(name, T.handle())
        setattr(a, name, T.match_buffer(handle, dims, dtype, strides=strides, align=1))

    strides = [*(T.int64() for _ in range(3)), T.int64(1)]
    tensor("x", (batch, heads, T.int64(), size), "float32", strides)
    tensor("codes", (batch, heads, blocks, TOKENS * size * shape.bits // 8), "uint8")
    tensor("midpoints", (2**shape.bits - 1,), "float32")
    tensor("levels", (2**shape.bits,), "int8")
    a.unit = T.arg("unit", T.float32())
    if shape.kind == "key":
        a.group = T.arg("group", T.int64())
    affine = (scales, heads, groups, size) if shape.kind == "key" else (batch, blocks, TOKENS)
    tensor("scale", affine, "float16")
    tensor("zero", affine, "float16")
    if shape.weighted:
        tensor("weight", (1, heads, 1, size), "float16")
    if count:
        tensor("outliers", (batch, blocks, TOKENS * count), "int32")
        tensor("offsets", (batch, blocks, heads + 1), "int32")
    return a


class _Block:
    """One block; scale, zero and divisor (the scale, 1 for 0) are kept as float32."""

    def __init__(self, shape: Shape, a: Any, task: Expr, scales: int) -> None:
        self.shape, self.a = shape, a
        self.b, self.block = divided(task, a.blocks)
        self.first = T.Bind(self.block * TOKENS)
        self.scale, self.zero, self.divisor = (local((scales,)) for _ in range(3))
        self.midpoints = [T.Bind(get(a.midpoints, i)) for i in range(2**shape.bits - 1)]
        self.levels = [
            T.Bind(T.Cast("float32", get(a.levels, i)) * a.unit) for i in range(2**shape.bits)
        ]
        self.used = local((1,), "int64")
        put(self.used, T.int64(0), 0)

    def affine(self, buffer: Any, head: Expr, token: Expr, channel: Expr) -> Expr:
        """Scale, zero or divisor of a vector of channels of a token."""
        raise NotImplementedError

    def x(self, head: Expr, token: Expr, channel: Expr, lanes: int = LANES) -> Expr:
        return load(self.a.x, self.b, head, self.first + token, channel, lanes=lanes)

    def normalised(self, head: Expr, token: Expr, channel: Expr) -> Expr:
        at = (head, token, channel)
        centred = T.Bind(self.x(*at) - self.affine(self.zero, *at))
        return T.Bind(centred / self.affine(self.divisor, *at))

    def codes(self, y: Expr) -> Expr:
        """int32: how many midpoints lie below normalised values."""
        below = (T.Cast(FLOATS.ints, FLOATS.of(midpoint) < y) for midpoint in self.midpoints)
        total = local((LANES,), "int32")
        store(total, sum(below, next(below)), 0, lanes=LANES)
        return load(total, 0, lanes=LANES)

    def error(self, y: Expr, head: Expr, token: Expr, channel: Expr) -> Expr:
        """Values less what their codes read as."""
        at, level = (head, token, channel), local((LANES,))
        value = FLOATS.of(self.levels[0])
        for midpoint, above in zip(self.midpoints, self.levels[1:], strict=True):
            value = T.Select(FLOATS.of(midpoint) < y, FLOATS.of(above), value)
        store(level, value, 0, lanes=LANES)
        product = load(level, 0, lanes=LANES) * self.affine(self.scale, *at)
        product = call(FLOATS.dtype, f"llvm.arithmetic.fence.{suffix(FLOATS.dtype)}", product)
        return T.Bind(self.x(*at) - (product + self.affine(self.zero, *at)))

    def set_scale(self, i: Expr, scale: Expr, zero: Expr) -> None:
        """Keep float16 scale and zero at place i."""
        wide = T.Bind(T.Cast("float32", scale))
        put(self.scale, wide, i)
        put(self.zero, T.Cast("float32", zero), i)
        put(self.divisor, T.Select(wide == T.float32(0), T.float32(1), wide), i)

    def vectors(self, visit: Callable[[Expr, Expr, Expr], None]) -> None:
        """visit(head, channel, flat channel) of each vector."""
        with loop(self.shape.heads) as head, loop(self.shape.size // LANES) as i:
            visit(head, i * LANES, T.Bind(head * self.shape.size + i * LANES))

    def start_head(self, head: Expr) -> None:
        put(self.a.offsets, T.Cast("int32", self.used[0]), self.b, self.block, head)

    def write_outlier(self, head: Expr, token: Expr, channel: Expr) -> None:
        """The next entry; a residual of 0 needs none."""
        lane, errors = T.Bind(T.bitwise_and(channel, T.int64(LANES - 1))), local((LANES,))
        at = (head, token, T.Bind(channel - lane))
        store(errors, self.error(self.normalised(*at), *at), 0, lanes=LANES)
        clamped = T.min(get(errors, lane), T.float32(HALF_MAX))
        half = T.Cast("float16", T.max(clamped, T.float32(-HALF_MAX)))
        bits = T.Bind(T.Cast("int32", T.reinterpret("uint16", half)))
        with T.If(T.bitwise_and(bits, T.int32(0x7FFF)) != 0), T.Then():
            place = T.Bind(T.Cast("int32", token * 256 + channel))
            entry = T.shift_left(place, T.int32(16)) + bits
            put(self.a.outliers, entry, self.b, self.block, self.used[0])
            put(self.used, self.used[0] + 1, 0)

    def end_outliers(self) -> None:
        self.start_head(T.int64(self.shape.heads))
        with loop(TOKENS * self.shape.count, opaque(self.used[0])) as i:
            put(self.a.outliers, T.int32(0), self.b, self.block, i)


class _Keys(_Block):
    """Scale and zero by channel; outliers: the largest weighted errors of the block."""

    def __init__(self, shape: Shape, a: Any, task: Expr) -> None:
        super().__init__(shape, a, task, shape.width)

    def affine(self, buffer: Any, head: Expr, token: Expr, channel: Expr) -> Expr:
        return load(buffer, head * self.shape.size + channel, lanes=LANES)

    def run(self) -> None:
        a, shape = self.a, self.shape
        row = opaque(T.min(self.b, a.scales - 1))
        group = divided(self.block, a.group)[0]
        if shape.weighted:
            self.weight = local((shape.width,))
        with loop(shape.heads) as head, loop(shape.size) as channel:
            flat = T.Bind(head * shape.size + channel)
            scale, zero = (get(part, row, head, group, channel) for part in (a.scale, a.zero))
            self.set_scale(flat, scale, zero)
            if shape.weighted:
                weight = T.Cast("float32", get(a.weight, 0, head, 0, channel))
                put(self.weight, weight, flat)
        if shape.count:
            self.errors = local((shape.heads * TOKENS, shape.size))
            self.tops = local((shape.heads * TOKENS * LANES,))
            with loop(shape.heads * TOKENS) as i:
                store(self.tops, FLOATS.of(0.0), i * LANES, lanes=LANES)
        with loop(shape.heads) as head:
            self._write_codes(head)
        if shape.count:
            self._write_outliers()

    def _write_outliers(self) -> None:
        """Candidates reach what as many of the vectors' largest reach."""
        shape, most = self.shape, TOKENS * self.shape.count
        ends = local((shape.heads + 1,), "int64")
        found = Candidates(shape.width * TOKENS)
        found.clear()
        put(ends, T.int64(0), 0)
        tops = shape.heads * TOKENS * LANES
        floor = kth(self.tops, T.int64(tops), most) if most <= tops else T.float32(0)
        floor = T.Bind(T.max(floor, T.float32(1e-45)))
        with loop(shape.heads) as head:
            with loop(TOKENS) as token, loop(shape.size // LANES) as i:
                errors = load(self.errors, head * TOKENS + token, i * LANES, lanes=LANES)
                found.add(errors, token * 256 + i * LANES, errors >= FLOATS.of(floor))
            put(ends, found.count[0], head + 1)
        length = found.pad(-1.0)
        least = kth(found.values, length, most)
        level = local((1,), "int32")
        put(
            level, T.int32(most) - count_of(found.values, length, lambda x: x > FLOATS.of(least)), 0
        )
        with loop(shape.heads) as head:
            self.start_head(head)
            with loop(opaque(get(ends, head + 1)), opaque(get(ends, head))) as i:
                error, place = T.Bind(get(found.values, i)), T.Bind(get(found.places, i))
                last = T.And(error == least, level[0] > T.int32(0))
                with T.If(T.Or(error > least, last)), T.Then():
                    put(level, level[0] - T.Cast("int32", error == least), 0)
                    wide = T.Bind(T.Cast("int64", place))
                    token = T.Bind(T.shift_right(wide, T.int64(8)))
                    self.write_outlier(head, token, T.Bind(T.bitwise_and(wide, T.int64(255))))
        self.end_outliers()

    def _coded(self, head: Expr, token: Expr, channel: Expr) -> Expr:
        """Codes; keeps how much they err."""
        at = (head, token, channel)
        y = self.normalised(*at)
        if self.shape.count:
            error = FLOATS.abs(self.error(y, *at))
            if self.shape.weighted:
                error = T.Bind(error * self.affine(self.weight, *at))
            row = T.Bind(head * TOKENS + token)
            store(self.errors, error, row, channel, lanes=LANES)
            top = FLOATS.max(load(self.tops, row * LANES, lanes=LANES), error)
            store(self.tops, top, row * LANES, lanes=LANES)
        return self.codes(y)

    def _write_codes(self, head: Expr) -> None:
        """Rows of one byte of each of 32 tokens; a byte holds pairs of channels D/2 apart."""
        half, planes = self.shape.size // 2, PLANES[self.shape.bits]
        with loop(half // LANES) as i, loop(TOKENS // 4) as quad:
            words: list[Expr] = [None] * len(planes)
            for t in range(4):
                token = T.Bind(quad * 4 + t)
                low, high = (self._coded(head, token, i * LANES + side) for side in (0, half))
                for p, width in enumerate(planes):
                    first, second = (_plane(codes, planes, p) for codes in (low, high))
                    pair = first + T.shift_left(second, fill(width, "int32", LANES))
                    pair = T.shift_left(pair, fill(8 * t, "int32", LANES))
                    words[p] = T.Bind(pair if words[p] is None else words[p] + pair)
            start = 0
            for word, width in zip(words, planes, strict=True):
                self._store_rows(word, width, (head, start, i, quad))
                start += TOKENS * self.shape.size * width // 8

    def _store_rows(self, words: Expr, width: int, at: tuple[Any, ...]) -> None:
        """Lanes are pairs of channels of four tokens; a row takes 4 / width pairs."""
        head, start, i, quad = at
        pairs, per = local((LANES,), "int32"), 4 // width
        store(pairs, words, 0, lanes=LANES)
        for row in range(LANES // per):
            word = get(pairs, row * per)
            for k in range(1, per):
                word = word + T.shift_left(get(pairs, row * per + k), T.int32(2 * width * k))
            place = start + (i * (LANES // per) + row) * TOKENS + quad * 4
            part = T.reinterpret("uint8x4", T.Bind(word))
            store(self.a.codes, part, self.b, head, self.block, place, lanes=4)


class _Values(_Block):
    """Scale and zero by token; outliers: its largest and smallest."""

    def __init__(self, shape: Shape, a: Any, task: Expr) -> None:
        super().__init__(shape, a, task, TOKENS)

    def affine(self, buffer: Any, head: Expr, token: Expr, channel: Expr) -> Expr:
        return FLOATS.of(get(buffer, token))

    def run(self) -> None:
        if self.shape.count:
            self.chosen = local((TOKENS, self.shape.count + 1), "int32")
            self.cursor, self.candidates = local((TOKENS,), "int64"), Candidates(self.shape.width)
        self._choose_all()
        with loop(self.shape.heads) as head:
            self._write_codes(head)
        if self.shape.count:
            self._write_outliers()

    def _choose_all(self) -> None:
        """Scale and zero, and each token's row of ``chosen``."""
        low = self.shape.count // 2
        high = self.shape.count - low
        largest, smallest = Largest(high + 1), Largest(low + 1, latest=True)
        with loop(TOKENS) as token:
            self._choose(token, largest, smallest)
            if self.shape.count:

                def chosen(x: Expr, place: Expr) -> Expr:
                    top = largest.holds(x, place, high)
                    return T.Or(top, smallest.holds(-x, place, low)) if low else top

                self._write_row(token, chosen)

    def _choose(self, token: Expr, largest: Largest, smallest: Largest) -> None:
        """The range of a token is what its outliers leave."""
        floors = self._floors(token, largest.k, smallest.k)
        if self.shape.count:
            self.candidates.clear()
            for found in (largest, smallest):
                found.clear(-float("inf"))

            def visit(head: Expr, channel: Expr, flat: Expr) -> None:
                x = self.x(head, token, channel)
                high, low = map(FLOATS.of, floors)
                self.candidates.add(x, flat, T.Or(x >= high, -x >= low))

            def insert(x: Expr, place: Expr) -> None:
                largest.insert(x, place)
                smallest.insert(-x, place)

            self.vectors(visit)
            self.candidates.each(insert)
            floors = largest.least, smallest.least
        whole = self.shape.count == self.shape.width
        top, bottom = (T.float32(0) if whole else floor for floor in floors)
        zero, scale = (T.Bind(x / T.float32(2)) for x in (top - bottom, top + bottom))
        limit = T.float32(HALF_MAX)
        zero = T.Bind(T.Cast("float16", T.max(T.min(zero, limit), -limit)))
        scale = T.Bind(T.Cast("float16", T.min(scale, limit)))
        put(self.a.zero, zero, self.b, self.block, token)
        put(self.a.scale, scale, self.b, self.block, token)
        self.set_scale(token, scale, zero)

    def _write_row(self, token: Expr, chosen: Callable[[Expr, Expr], Expr]) -> None:
        """A row of ``chosen``: the candidates for which chosen(value, place), and an end."""
        length = local((1,), "int64")
        put(length, T.int64(0), 0)

        def add(value: Expr, place: Expr) -> None:
            put(self.chosen, place, token, length[0])
            put(length, length[0] + T.Cast("int64", chosen(value, place)), 0)

        self.candidates.each(add)
        put(self.chosen, T.int32(self.shape.width), token, length[0])
        put(self.cursor, T.int64(0), token)

    def _write_outliers(self) -> None:
        size, cursor = self.shape.size, self.cursor
        with loop(self.shape.heads) as head:
            self.start_head(head)
            end = T.Bind(T.Cast("int32", (head + 1) * size))
            with loop(TOKENS) as token:
                with T.While(get(self.chosen, token, get(cursor, token)) < end):
                    flat = T.Cast("int64", get(self.chosen, token, get(cursor, token)))
                    channel = T.Bind(flat - head * size)
                    put(cursor, get(cursor, token) + 1, token)
                    self.write_outlier(head, token, channel)
        self.end_outliers()

    def _floors(self, token: Expr, high: int, low: int) -> tuple[Expr, Expr]:
        """What the high-th largest values and the low-th largest of -x at least are."""
        vectors = self.shape.size // LANES
        parts = next(n for n in (4, 2, 1) if vectors % n == 0 and (n == 1 or n * 4 <= high))
        tops = [Registers(parts, "float32", LANES) for _ in range(2)]
        for top in tops:
            for part in range(parts):
                top[part] = FLOATS.of(-float("inf"))
        with loop(self.shape.heads) as head, loop(vectors // parts) as i:
            for part in range(parts):
                x = self.x(head, token, (i * parts + part) * LANES)
                for top, one in zip(tops, (x, -x), strict=True):
                    top[part] = FLOATS.max(top[part], one)
        high, low = (
            bound([top[part] for part in range(parts)], k)
            for top, k in zip(tops, (high, low), strict=True)
        )
        return high, low

    def _write_codes(self, head: Expr) -> None:
        """16-bit words of every other token; a pair of words, tokens t and t + 1, is a lane."""
        size, planes = self.shape.size, PLANES[self.shape.bits]
        per = TOKENS // planes[0]
        with loop(size // LANES) as i:
            words, channel = Registers(len(planes), "int32", LANES), i * LANES

            def write(p: int, start: Expr) -> None:
                part = T.reinterpret(f"uint8x{4 * LANES}", words[p])
                store(self.a.codes, part, self.b, head, self.block, start, lanes=4 * LANES)

            with loop(planes[0]) as group:
                words[0] = fill(0, "int32", LANES)
                with loop(per) as t:
                    token = T.Bind(group * per + t)
                    codes = self.codes(self.normalised(head, token, channel))
                    for p, width in enumerate(planes):
                        place = T.Cast("int32", token if p else t)
                        pair = T.shift_right(place, T.int32(1)) * width
                        move = pair + T.shift_left(T.bitwise_and(place, T.int32(1)), T.int32(4))
                        part = _plane(codes, planes, p)
                        moved = T.shift_left(part, T.broadcast(T.Bind(move), LANES))
                        words[p] = T.bitwise_or(words[p], moved)
                write(0, (group * size + channel) * 4)
            if len(planes) > 1:
                write(1, (planes[0] * size + channel) * 4)


def _plane(codes: Expr, planes: tuple[int, ...], p: int) -> Expr:
    """The bits of codes that plane p holds."""
    if len(planes) == 1:
        return codes
    if p:
        return T.Bind(T.shift_right(codes, fill(sum(planes[:p]), "int32", LANES)))
    return T.Bind(T.bitwise_and(codes, fill(2 ** planes[0] - 1, "int32", LANES)))
