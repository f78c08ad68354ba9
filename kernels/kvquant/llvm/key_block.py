"""Quantise and pack a block of keys, whose outliers are those of the whole block."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.layout import PLANES
from regraft.kernels.kvquant.llvm.block import FLOATS, LANES, TOKENS, Block, Shape, plane
from regraft.kernels.kvquant.llvm.largest import Candidates, count_of, kth
from regraft.kernels.kvquant.llvm.simd import (
    Expr,
    Registers,
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
        if shape.feedback:
            self.weight = local((shape.width,))
        with loop(shape.heads) as head, loop(shape.size) as channel:
            flat = T.Bind(head * shape.size + channel)
            scale, zero = (get(part, row, head, group, channel) for part in (a.scale, a.zero))
            self.set_scale(flat, scale, zero)
            if shape.feedback:
                weight = T.Cast("float32", get(a.weight, 0, head, 0, channel))
                put(self.weight, weight, flat)
        if shape.count:
            self._find_outliers()
        with loop(shape.heads) as head:
            if shape.feedback:
                self.turns.clear()
            if shape.count:
                self._choose_outliers(head)
            self.code(head)
            self._write_codes(head)
            if shape.count:
                self._write_outliers(head)
        if shape.count:
            self.end_outliers()

    def _find_outliers(self) -> None:
        """Candidates by head: errors that reach what as many of the vectors' largest reach."""
        shape, most = self.shape, TOKENS * self.shape.count
        errors = local((shape.heads * TOKENS, shape.size))
        tops = local((shape.heads * TOKENS * LANES,))
        with loop(shape.heads) as head, loop(TOKENS) as token:
            row, top = T.Bind(head * TOKENS + token), Registers(1, "float32", LANES)
            top[0] = FLOATS.of(0.0)
            with loop(shape.size // LANES) as i:
                error = self._cost(head, token, i * LANES)
                store(errors, error, row, i * LANES, lanes=LANES)
                top[0] = FLOATS.max(top[0], error)
            store(tops, top[0], row * LANES, lanes=LANES)
        self.ends, self.row = local((shape.heads + 1,), "int64"), local((most,), "int64")
        self.length = local((1,), "int64")
        self.found = Candidates(shape.width * TOKENS)
        self.found.clear()
        put(self.ends, T.int64(0), 0)
        vectors = shape.heads * TOKENS * LANES
        floor = kth(tops, T.int64(vectors), most) if most <= vectors else T.float32(0)
        floor = T.Bind(T.max(floor, T.float32(1e-45)))
        with loop(shape.heads) as head:
            with loop(TOKENS) as token, loop(shape.size // LANES) as i:
                error = load(errors, head * TOKENS + token, i * LANES, lanes=LANES)
                self.found.add(error, token * 256 + i * LANES, error >= FLOATS.of(floor))
            put(self.ends, self.found.count[0], head + 1)
        length = self.found.pad(-1.0)
        self.least = kth(self.found.values, length, most)
        self.level = local((1,), "int32")
        above = count_of(self.found.values, length, lambda x: x > FLOATS.of(self.least))
        put(self.level, T.int32(most) - above, 0)

    def _cost(self, head: Expr, token: Expr, channel: Expr) -> Expr:
        at = (head, token, channel)
        error = FLOATS.abs(self.error(self.normalised(*at), *at))
        return T.Bind(error * self.affine(self.weight, *at)) if self.shape.feedback else error

    def _choose_outliers(self, head: Expr) -> None:
        """The head's candidates among the block's largest, in ``row``."""
        put(self.length, T.int64(0), 0)
        with loop(opaque(get(self.ends, head + 1)), opaque(get(self.ends, head))) as i:
            error, place = T.Bind(get(self.found.values, i)), T.Bind(get(self.found.places, i))
            last = T.And(error == self.least, self.level[0] > T.int32(0))
            with T.If(T.Or(error > self.least, last)), T.Then():
                put(self.level, self.level[0] - T.Cast("int32", error == self.least), 0)
                put(self.row, T.Cast("int64", place), self.length[0])
                put(self.length, self.length[0] + 1, 0)
                if self.shape.feedback:
                    self.turns.mark(*self._token_and_channel(T.Cast("int64", place)))

    def _write_outliers(self, head: Expr) -> None:
        self.start_head(head)
        with loop(opaque(self.length[0])) as i:
            self.write_outlier(head, *self._token_and_channel(T.Bind(get(self.row, i))))

    def _token_and_channel(self, place: Expr) -> tuple[Expr, Expr]:
        return T.Bind(T.shift_right(place, T.int64(8))), T.Bind(T.bitwise_and(place, T.int64(255)))

    def _write_codes(self, head: Expr) -> None:
        """Rows of one byte of each of 32 tokens; a byte holds pairs of channels D/2 apart."""
        half, planes = self.shape.size // 2, PLANES[self.shape.bits]
        with loop(half // LANES) as i, loop(TOKENS // 4) as quad:
            words: list[Expr] = [None] * len(planes)
            for t in range(4):
                token = T.Bind(quad * 4 + t)
                low, high = (self.codes_of(token, i * LANES + side) for side in (0, half))
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
