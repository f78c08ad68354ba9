"""Quantise and pack a block of keys, whose outliers are those of the whole block."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.layout import PLANES
from regraft.kernels.kvquant.llvm.block import FLOATS, LANES, TOKENS, Block, Shape, plane
from regraft.kernels.kvquant.llvm.largest import Candidates, count_of, kth
from regraft.kernels.kvquant.llvm.simd import (
    Expr,
    divided,
    fill,
    get,
    load,
    local,
    loop,
    opaque,
    put,
    store,
)


class KeyBlock(Block):
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
                    first, second = (plane(codes, planes, p) for codes in (low, high))
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
