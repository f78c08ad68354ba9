"""Quantise and pack whole blocks of keys and values: the kernel for processors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.layout import PLANES
from regraft.kernels.kvquant.llvm.simd import (
    Expr,
    Floats,
    divided,
    fill,
    get,
    load,
    load_float,
    local,
    loop,
    opaque,
    parallel,
    put,
    store,
    strided,
    tensor,
)

TOKENS, LANES = 32, 8
FLOATS = Floats(LANES)
HALF_MAX = 65504.0


@dataclass(frozen=True)
class Side:
    """Keys or values of one layer: heads of ``size`` channels; ``count`` outliers a token of
    values, 0 for keys."""

    kind: str
    heads: int
    size: int
    bits: int
    count: int
    dtype: str


def make(side: Side) -> Any:
    """The PrimFunc ``append`` that codes the blocks of x [B, H, 32 * n, D] from block start on."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("append")
            batch, length, scales, groups = (T.int64() for _ in range(4))
            x = strided("x", (batch, side.heads, length, side.size), side.dtype)
            blocks = T.arg("blocks", T.int64())
            start = T.arg("start", T.int64())
            group = T.arg("group", T.int64())
            unit = T.arg("unit", T.float32())
            levels = tensor("levels", (2**side.bits,), "int8")
            midpoints = tensor("midpoints", (2**side.bits - 1,), "float32")
            code_bytes = TOKENS * side.size * side.bits // 8
            codes = tensor("codes", (batch, side.heads, T.int64(), code_bytes), "uint8")
            shape: tuple[Any, ...] = (batch, T.int64(), TOKENS)
            if side.kind == "key":
                shape = (scales, side.heads, groups, side.size)
            scale, zero = (tensor(name, shape, "float16") for name in ("scale", "zero"))
            entries = offsets = None
            if side.count:
                shape = (batch, T.int64(), TOKENS * side.count)
                entries = tensor("entries", shape, "int32")
                offsets = tensor("offsets", (batch, T.int64(), side.heads + 1), "int32")
            with parallel(batch * blocks) as task:
                b, block = divided(task, blocks)
                read = Reader(side, x, b, block, levels, midpoints, unit)
                chosen = Chosen(side) if side.count else None
                if side.kind == "key":
                    sequence = opaque(T.min(b, scales - 1))
                    row = divided(start + block, group)[0]
                    raw = _keys(read, scale, zero, sequence, row)
                else:
                    raw = _values(read, chosen, scale, zero, (b, start + block))
                with loop(side.heads) as head:
                    pack = _pack_keys if side.kind == "key" else _pack_values
                    pack(side, raw, head, codes, (b, head, start + block))
                if chosen is not None:
                    chosen.write(entries, offsets, (b, start + block))
    return builder.get().with_attr("global_symbol", "append")


class Reader:
    """The numbers of one block, and what they are coded as."""

    def __init__(
        self, side: Side, x: Any, b: Expr, block: Expr, levels: Any, midpoints: Any, unit: Expr
    ) -> None:
        self.side, self.x, self.b, self.first = side, x, b, T.Bind(block * TOKENS)
        self.levels, self.midpoints, self.unit = levels, midpoints, unit

    def vector(self, head: Expr, token: Expr, channel: Expr) -> Expr:
        return load_float(self.x, self.b, head, self.first + token, channel, lanes=LANES)

    def codes(self, y: Expr) -> Expr:
        """int32 vector of the numbers of midpoints below y."""
        one, none = fill(1, "int32", LANES), fill(0, "int32", LANES)
        code = none
        for i in range(2**self.side.bits - 1):
            above = y > FLOATS.of(get(self.midpoints, i))
            code = T.Bind(code + T.Select(above, one, none))
        return code

    def residual(self, x: Expr, code: Expr, scale: Expr, zero: Expr) -> Expr:
        """Bits of the float16 difference of a number and what its code reads as."""
        level = T.Cast("float32", get(self.levels, T.Cast("int64", code)))
        rest = x - (level * self.unit * scale + zero)
        rest = T.max(T.min(rest, T.float32(HALF_MAX)), T.float32(-HALF_MAX))
        bits = T.reinterpret("uint16", T.Cast("float16", rest))
        return T.Bind(T.Cast("int32", bits))


class Chosen:
    """The outliers of a block's tokens: their heads and their entries."""

    def __init__(self, side: Side) -> None:
        self.side = side
        shape = (TOKENS, side.count)
        self.head, self.entry = local(shape, "int32"), local(shape, "int32")

    def put(self, token: Expr, i: Expr, head: Expr, channel: Expr, bits: Expr) -> None:
        """Make a channel the i-th outlier of a token."""
        places = ((token, 24), (channel, 16))
        parts = [T.shift_left(T.Cast("int32", n), T.int32(bit)) for n, bit in places]
        put(self.head, T.Cast("int32", head), token, i)
        put(self.entry, T.bitwise_or(T.bitwise_or(*parts), bits), token, i)

    def write(self, entries: Any, offsets: Any, at: tuple[Expr, ...]) -> None:
        """The entries by head, without those whose residual is zero."""
        written = local((1,), "int64")
        put(written, T.int64(0), 0)
        with loop(self.side.heads) as head:
            put(offsets, T.Cast("int32", written[0]), *at, head)
            with loop(TOKENS) as token, loop(self.side.count) as i:
                mine = get(self.head, token, i) == T.Cast("int32", head)
                entry = T.Bind(get(self.entry, token, i))
                filled = T.bitwise_and(entry, T.int32(0x7FFF)) != T.int32(0)
                with T.If(T.And(mine, filled)), T.Then():
                    put(entries, entry, *at, written[0])
                    put(written, written[0] + 1, 0)
        put(offsets, T.Cast("int32", written[0]), *at, self.side.heads)


def _keys(read: Reader, scale: Any, zero: Any, sequence: Expr, row: Expr) -> Any:
    """Codes [H * D, 32] of keys with given scales and zeros."""
    side = read.side
    raw = local((side.heads * side.size, TOKENS), "uint8")
    codes = local((LANES,), "int32")
    with loop(side.heads) as head, loop(side.size // LANES) as i:
        channel = T.Bind(i * LANES)
        at = (sequence, head, row, channel)
        gain, middle = (
            T.Bind(T.Cast(FLOATS.dtype, load(t, *at, lanes=LANES))) for t in (scale, zero)
        )
        divisor = T.Bind(T.Select(gain == FLOATS.of(0.0), FLOATS.of(1.0), gain))
        with loop(TOKENS) as token:
            x = read.vector(head, token, channel)
            store(codes, read.codes(T.Bind((x - middle) / divisor)), 0, lanes=LANES)
            with loop(LANES) as k:
                code = T.Cast("uint8", get(codes, k))
                put(raw, code, head * side.size + channel + k, token)
    return raw


def _values(
    read: Reader, chosen: Chosen | None, scale: Any, zero: Any, at: tuple[Expr, ...]
) -> Any:
    """Codes [32, H * D] of values; a token's largest and smallest are its outliers, the next ones
    its range."""
    side, width = read.side, read.side.heads * read.side.size
    raw, row = local((TOKENS, width), "uint8"), local((width,))
    high, low = side.count - side.count // 2, side.count // 2
    with loop(TOKENS) as token:
        with loop(side.heads) as head, loop(side.size // LANES) as i:
            values = read.vector(head, token, i * LANES)
            store(row, values, head * side.size + i * LANES, lanes=LANES)
        top, bottom = Extremes(row, width, high + 1, 1), Extremes(row, width, low + 1, -1)
        biggest, least = top.value(high), bottom.value(low)
        limit = T.float32(HALF_MAX)
        middle = T.max(T.min((biggest + least) * T.float32(0.5), limit), -limit)
        middle = T.Bind(T.Cast("float16", middle))
        gain = T.Bind(T.Cast("float16", T.min((biggest - least) * T.float32(0.5), limit)))
        put(scale, gain, *at, token)
        put(zero, middle, *at, token)
        gain, middle = T.Bind(T.Cast("float32", gain)), T.Bind(T.Cast("float32", middle))
        divisor = T.Bind(T.Select(gain == T.float32(0), T.float32(1), gain))
        with loop(width // LANES) as i:
            x = load(row, i * LANES, lanes=LANES)
            codes = read.codes(T.Bind((x - FLOATS.of(middle)) / FLOATS.of(divisor)))
            store(raw, T.Cast(f"uint8x{LANES}", codes), token, i * LANES, lanes=LANES)
        for extremes, number, begin in ((top, high, 0), (bottom, low, high)):
            if chosen is None or not number:
                continue
            with loop(number) as i:
                place = opaque(T.Cast("int64", get(extremes.places, i)))
                head, channel = divided(place, side.size)
                code = T.Cast("int32", get(raw, token, place))
                bits = read.residual(T.Bind(get(row, place)), code, gain, middle)
                chosen.put(token, i + begin, head, channel, bits)
    return raw


class Extremes:
    """The ``number`` largest (sign 1) or smallest (-1) of row [width], the furthest first. Equal
    ones are taken from the row's begin and end, so that no element is both."""

    def __init__(self, row: Any, width: int, number: int, sign: int) -> None:
        self.sign, last = sign, number - 1
        self.far, self.places = local((number,)), local((number,), "int32")
        with loop(number) as i:
            put(self.far, T.float32(-3e38), i)
            put(self.places, T.int32(0 if sign > 0 else width - 1), i)
        with loop(width // LANES) as step:
            start = T.Bind((step if sign > 0 else width // LANES - 1 - step) * LANES)
            values = T.Bind(load(row, start, lanes=LANES) * FLOATS.of(float(sign)))
            with T.If(FLOATS.largest(values) > get(self.far, last)), T.Then():
                with loop(LANES) as k:
                    place = T.Bind(start + (k if sign > 0 else LANES - 1 - k))
                    value = T.Bind(get(row, place) * T.float32(sign))
                    with T.If(value > get(self.far, last)), T.Then():
                        self._insert(value, T.Cast("int32", place), last)

    def value(self, i: int) -> Expr:
        return T.Bind(get(self.far, i) * T.float32(self.sign))

    def _insert(self, value: Expr, place: Expr, last: int) -> None:
        moving, where = local((1,)), local((1,), "int32")
        put(moving, value, 0)
        put(where, place, 0)
        with loop(last + 1) as i:
            old, old_place = T.Bind(get(self.far, i)), T.Bind(get(self.places, i))
            with T.If(moving[0] > old), T.Then():
                put(self.far, moving[0], i)
                put(self.places, where[0], i)
                put(moving, old, 0)
                put(where, old_place, 0)


def _pack_keys(side: Side, raw: Any, head: Expr, codes: Any, at: tuple[Expr, ...]) -> None:
    """A row of 32 tokens for each byte of a token's codes, channels in rotation pairs."""
    half, start, low = side.size // 2, 0, 0
    for bits in PLANES[side.bits]:
        pairs = 4 // bits
        with loop(half // pairs) as i:
            row = None
            for n in range(2 * pairs):
                channel = head * side.size + i * pairs + n // 2 + n % 2 * half
                code = load(raw, channel, 0, lanes=TOKENS)
                part = _bits(code, low, bits, bits * n, f"uint8x{TOKENS}")
                row = part if row is None else T.Bind(T.bitwise_or(row, part))
            store(codes, row, *at, (start + i) * TOKENS, lanes=TOKENS)
        start, low = start + half // pairs, low + bits


def _pack_values(side: Side, raw: Any, head: Expr, codes: Any, at: tuple[Expr, ...]) -> None:
    """Words of 16 bits [token group, channel, token parity], every other token in one."""
    dtype, start, low = f"uint32x{LANES}", 0, 0
    for bits in PLANES[side.bits]:
        per = 16 // bits
        for group in range(TOKENS // (2 * per)):
            with loop(side.size // LANES) as i:
                words = None
                for token in range(2 * per):
                    data = load(
                        raw, group * 2 * per + token, head * side.size + i * LANES, lanes=LANES
                    )
                    place = token // 2 * bits + token % 2 * 16
                    part = _bits(T.Cast(dtype, data), low, bits, place, dtype)
                    words = part if words is None else T.Bind(T.bitwise_or(words, part))
                at_byte = (start + group) * side.size * 4 + i * LANES * 4
                data = T.reinterpret(f"uint8x{4 * LANES}", words)
                store(codes, data, *at, at_byte, lanes=4 * LANES)
        start, low = start + TOKENS // (2 * per), low + bits


def _bits(codes: Expr, low: int, count: int, place: int, dtype: str) -> Expr:
    """``count`` bits of codes from bit ``low`` on, moved to bit ``place``."""
    kind, lanes = dtype.split("x")

    def all_of(value: int) -> Expr:
        return fill(value, kind, int(lanes))

    found = T.bitwise_and(T.shift_right(codes, all_of(low)), all_of(2**count - 1))
    return T.Bind(T.shift_left(found, all_of(place)))
