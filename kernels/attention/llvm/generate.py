"""Attention of few queries to a dense cache: the kernel for processors.

Four query rows make a tile: a vector of keys or values, converted once, serves them all. Scores lie
[token, row], so that their softmax is taken for the rows side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.llvm.simd import (
    Expr,
    Floats,
    Registers,
    divided,
    get,
    load,
    load_float,
    local,
    loop,
    opaque,
    parallel,
    put,
    shuffle,
    store,
    strided,
    tensor,
)

SPAN, ROWS = 256, 4
NEVER, UNSEEN = -1e30, -3e38
EIGHT = Floats(8)


@dataclass(frozen=True)
class Shape:
    """What a kernel is generated for."""

    level: str
    heads: int
    key_size: int
    value_size: int
    dtype: str


def make(shape: Shape) -> Any:
    """The PrimFunc ``dense_attend``: the splits of the tokens in parallel, then their union."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("dense_attend")
            batch, query_heads, queries, length, splits, padded = (T.int64() for _ in range(6))
            heads, size, out_size = shape.heads, shape.key_size, shape.value_size
            q = tensor("q", (batch, query_heads, queries, size), "float32")
            key = strided("key", (batch, heads, length, size), shape.dtype)
            value = strided("value", (batch, heads, length, out_size), shape.dtype)
            out = tensor("out", (batch, query_heads, queries, out_size), "float32")
            first = tensor("first", (batch, queries), "int32")
            sinks = tensor("sinks", (query_heads,), "float32")
            scale = T.arg("scale", T.float32())
            sums = tensor("sums", (batch, heads, splits, padded, out_size), "float32")
            softmax = tensor("softmax", (batch, heads, splits, padded, 2), "float32")
            group = opaque(T.truncdiv(query_heads, T.int64(heads)))
            rows = opaque(group * queries)
            by_rows = T.decl_buffer(
                (batch, T.int64(heads), rows, T.int64(size)), data=q.data, align=4
            )
            with parallel(batch * heads * splits) as task:
                sequence, split = divided(task, splits)
                b, head = divided(sequence, heads)
                chunks = opaque(T.shift_right(length + (SPAN - 1), T.int64(8)))
                begin, end = (divided(chunks * n, splits)[0] for n in (split, split + 1))
                with loop(divided(padded, ROWS)[0]) as tile:
                    at = (b, head, split, T.Bind(tile * ROWS))
                    part = _Tile(shape, at, key, value, sums, softmax)
                    part.start(by_rows, rows, scale)
                    with loop(end, begin) as chunk:
                        part.add(T.Bind(chunk * SPAN), length, first, queries)
                    part.finish()
            with parallel(batch * heads) as task:
                b, head = divided(task, heads)
                with loop(rows) as row:
                    g, query = divided(row, queries)
                    query_head = T.Bind(head * group + g)
                    sink = T.Bind(get(sinks, query_head))
                    place = (b, query_head, query)
                    _unite(shape, sink, splits, softmax, sums, (b, head), row, out, place)
    return builder.get().with_attr("global_symbol", "dense_attend")


class _Tile:
    """Four query rows from at = (b, head, split, row) on, and what they have seen so far."""

    def __init__(
        self, shape: Shape, at: tuple[Expr, ...], key: Any, value: Any, sums: Any, softmax: Any
    ) -> None:
        self.shape, self.at = shape, at
        self.key, self.value, self.sums, self.softmax = key, value, sums, softmax
        self.floats = Floats(16 if shape.level == "avx512" else 8)
        self.q = local((ROWS, shape.key_size))
        self.scores = local((SPAN, ROWS))
        self.top, self.share = local((8,)), local((8,))
        self.alpha = local((8,))

    def start(self, q: Any, rows: Expr, scale: Expr) -> None:
        b, head, _, row = self.at
        lanes = self.floats.lanes
        for r in range(ROWS):
            source = opaque(T.min(row + r, rows - 1))
            with loop(self.shape.key_size // lanes) as i:
                x = load(q, b, head, source, i * lanes, lanes=lanes) * self.floats.of(scale)
                store(self.q, x, r, i * lanes, lanes=lanes)
            with loop(self.shape.value_size // lanes) as i:
                self._store_sum(r, i * lanes, self.floats.of(0.0))
        store(self.top, EIGHT.of(NEVER), 0, lanes=8)
        store(self.share, EIGHT.of(0.0), 0, lanes=8)

    def add(self, start: Expr, length: Expr, first: Any, queries: Expr) -> None:
        """See a span of tokens."""
        b, head, _, row = self.at
        count = opaque(T.min(length - start, T.int64(SPAN)))
        pairs = opaque(T.shift_right(count + 1, T.int64(1)))
        with loop(pairs) as i:
            tokens = [opaque(T.min(start + i * 2 + n, length - 1)) for n in (0, 1)]
            store(self.scores, self._score(tokens), i * 2, 0, lanes=8)
        for r in range(ROWS):
            query = divided(row + r, queries)[1]
            since = T.Cast("int64", get(first, b, query)) - start
            since = opaque(T.max(T.min(since, pairs * 2), T.int64(0)))
            until = opaque(
                T.max(T.min(length - queries + query + 1 - start, pairs * 2), T.int64(0))
            )
            with loop(since) as token:
                put(self.scores, T.float32(UNSEEN), token, r)
            with loop(pairs * 2, until) as token:
                put(self.scores, T.float32(UNSEEN), token, r)
        self._softmax(pairs)
        self._accumulate(start, count)

    def _score(self, tokens: list[Expr]) -> Expr:
        """Scores of two tokens, the rows of one after those of the other."""
        b, head, *_ = self.at
        lanes = self.floats.lanes
        sums = Registers(2 * ROWS, "float32", lanes)
        with loop(self.shape.key_size // lanes) as i:
            keys = [load_float(self.key, b, head, t, i * lanes, lanes=lanes) for t in tokens]
            for r in range(ROWS):
                x = load(self.q, r, i * lanes, lanes=lanes)
                for n, k in enumerate(keys):
                    sums[n * ROWS + r] = self.floats.fma(x, k, sums[n * ROWS + r])
        vectors = [sums[i] for i in range(2 * ROWS)]
        if lanes == 16:
            vectors = [shuffle([v], range(8)) + shuffle([v], range(8, 16)) for v in vectors]
        while len(vectors) > 1:
            vectors = [
                T.Bind(shuffle(pair, range(0, 16, 2)) + shuffle(pair, range(1, 16, 2)))
                for pair in zip(vectors[::2], vectors[1::2], strict=True)
            ]
        return vectors[0]

    def _softmax(self, pairs: Expr) -> None:
        before = load(self.top, 0, lanes=8)
        top, share = Registers(1, "float32", 8), Registers(1, "float32", 8)
        top[0] = before
        with loop(pairs) as i:
            top[0] = EIGHT.max(top[0], load(self.scores, i * 2, 0, lanes=8))
        now = EIGHT.max(top[0], shuffle([top[0]], (4, 5, 6, 7, 0, 1, 2, 3)))
        alpha = EIGHT.exp(before - now)
        store(self.top, now, 0, lanes=8)
        store(self.alpha, alpha, 0, lanes=8)
        share[0] = load(self.share, 0, lanes=8) * alpha
        with loop(pairs) as i:
            p = EIGHT.exp(load(self.scores, i * 2, 0, lanes=8) - now)
            store(self.scores, p, i * 2, 0, lanes=8)
            share[0] = share[0] + p
        store(self.share, share[0], 0, lanes=8)

    def _accumulate(self, start: Expr, count: Expr) -> None:
        b, head, split, row = self.at
        lanes = self.floats.lanes
        vectors = 2 if self.shape.value_size % (2 * lanes) == 0 else 1
        with loop(self.shape.value_size // (vectors * lanes)) as group:
            places = [T.Bind((group * vectors + v) * lanes) for v in range(vectors)]
            sums = Registers(ROWS * vectors, "float32", lanes)
            for r in range(ROWS):
                alpha = self.floats.of(get(self.alpha, r))
                for v, place in enumerate(places):
                    old = load(self.sums, b, head, split, row + r, place, lanes=lanes)
                    sums[r * vectors + v] = old * alpha
            with loop(count) as token:
                values = [
                    load_float(self.value, b, head, start + token, place, lanes=lanes)
                    for place in places
                ]
                for r in range(ROWS):
                    p = T.Bind(self.floats.of(get(self.scores, token, r)))
                    for v, x in enumerate(values):
                        k = r * vectors + v
                        sums[k] = self.floats.fma(x, p, sums[k])
            for r in range(ROWS):
                for v, place in enumerate(places):
                    self._store_sum(r, place, sums[r * vectors + v])

    def _store_sum(self, r: int, place: Expr, x: Expr) -> None:
        b, head, split, row = self.at
        store(self.sums, x, b, head, split, row + r, place, lanes=self.floats.lanes)

    def finish(self) -> None:
        *outer, row = self.at
        for r in range(ROWS):
            put(self.softmax, get(self.top, r), *outer, row + r, 0)
            put(self.softmax, get(self.share, r) + get(self.share, r + ROWS), *outer, row + r, 1)


def _unite(
    shape: Shape, sink: Expr, splits: Expr, softmax: Any, sums: Any, where: tuple[Expr, Expr],
    row: Expr, out: Any, at: tuple[Expr, ...],
) -> None:  # fmt: skip
    """out[*at]: the sums of all splits and the sink over their common denominator."""
    top, share = local((1,)), local((1,))
    put(top, T.max(sink, T.float32(NEVER)), 0)
    with loop(splits) as split:
        put(top, T.max(top[0], get(softmax, *where, split, row, 0)), 0)
    put(share, T.Select(sink > T.float32(NEVER), T.exp(sink - top[0]), T.float32(0)), 0)
    with loop(splits) as split:
        factor = T.Bind(T.exp(get(softmax, *where, split, row, 0) - top[0]))
        put(share, share[0] + factor * get(softmax, *where, split, row, 1), 0)
    inverse = T.Select(share[0] > T.float32(0), T.float32(1) / share[0], T.float32(0))
    inverse = T.Bind(inverse)
    with loop(shape.value_size // 8) as i:
        total = Registers(1, "float32", 8)
        with loop(splits) as split:
            factor = T.Bind(T.exp(get(softmax, *where, split, row, 0) - top[0]) * inverse)
            part = load(sums, *where, split, row, i * 8, lanes=8)
            total[0] = EIGHT.fma(part, EIGHT.of(factor), total[0])
        store(out, total[0], *at, i * 8, lanes=8)
