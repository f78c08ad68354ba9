"""Quantise and pack a block of values, whose ranges and outliers are those of each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.layout import PLANES
from regraft.kernels.kvquant.llvm.block import FLOATS, HALF_MAX, LANES, TOKENS, Block, Shape, plane
from regraft.kernels.kvquant.llvm.largest import Candidates, Largest, bound
from regraft.kernels.kvquant.llvm.simd import Expr, Registers, fill, get, local, loop, put, store


class ValueBlock(Block):
    """Scale and zero by token; outliers: its largest and smallest."""

    def __init__(self, shape: Shape, a: Any, task: Expr) -> None:
        super().__init__(shape, a, task, TOKENS)

    def affine(self, buffer: Any, head: Expr, token: Expr, channel: Expr) -> Expr:
        return FLOATS.of(get(buffer, token))

    def run(self) -> None:
        if self.shape.count:
            self.chosen = local((TOKENS, self.shape.count + 1), "int32")
            self.cursor, self.before = (local((TOKENS,), "int64") for _ in range(2))
            self.candidates = Candidates(self.shape.width)
        self._choose_all()
        with loop(self.shape.heads) as head:
            if self.shape.feedback:
                self.turns.clear()
                if self.shape.count:
                    self._mark(head)
            self.code(head)
            self._write_codes(head)
            if self.shape.count:
                self._write_outliers(head)
        if self.shape.count:
            self.end_outliers()

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

    def _mark(self, head: Expr) -> None:
        """The head's outliers leave no error; they will be visited once more."""
        self._each_outlier(head, self.turns.mark)
        with loop(TOKENS) as token:
            put(self.cursor, get(self.before, token), token)

    def _write_outliers(self, head: Expr) -> None:
        self.start_head(head)
        self._each_outlier(head, lambda *at: self.write_outlier(head, *at))

    def _each_outlier(self, head: Expr, visit: Callable[[Expr, Expr], None]) -> None:
        """visit(token, channel) of those of a head, the first not seen so far."""
        size, cursor = self.shape.size, self.cursor
        end = T.Bind(T.Cast("int32", (head + 1) * size))
        with loop(TOKENS) as token:
            put(self.before, get(cursor, token), token)
            with T.While(get(self.chosen, token, get(cursor, token)) < end):
                flat = T.Cast("int64", get(self.chosen, token, get(cursor, token)))
                channel = T.Bind(flat - head * size)
                put(cursor, get(cursor, token) + 1, token)
                visit(token, channel)

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
                    codes = self.codes_of(token, channel)
                    for p, width in enumerate(planes):
                        place = T.Cast("int32", token if p else t)
                        pair = T.shift_right(place, T.int32(1)) * width
                        move = pair + T.shift_left(T.bitwise_and(place, T.int32(1)), T.int32(4))
                        part = plane(codes, planes, p)
                        moved = T.shift_left(part, T.broadcast(T.Bind(move), LANES))
                        words[p] = T.bitwise_or(words[p], moved)
                write(0, (group * size + channel) * 4)
            if len(planes) > 1:
                write(1, (planes[0] * size + channel) * 4)
