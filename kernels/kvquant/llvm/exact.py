"""The exact tokens and the sinks, merged with the parts of the body."""

from __future__ import annotations

from typing import Any

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
    store,
)

LANES, SPAN = 8, 256
NEVER, UNSEEN = -1e30, -3e38
FLOATS = Floats(LANES)


def combine(shape: Any, a: Any) -> None:
    """out = softmax over the exact tokens, the sinks and the splits of the body, times values."""
    with parallel(a.batch * shape.heads) as task:
        b, head = divided(task, shape.heads)
        with loop(a.rows) as row:
            _Row(shape, a, b, head, row).run()


class _Row:
    """One query row: the sum of values so far, their softmax's maximum and denominator."""

    def __init__(self, shape: Any, a: Any, b: Expr, head: Expr, row: Expr) -> None:
        self.shape, self.a = shape, a
        self.b, self.head, self.row = b, head, row
        self.group, self.query = divided(row, a.queries)
        self.total, self.top, self.share = local((shape.value_size,)), local((1,)), local((1,))

    def run(self) -> None:
        a, out_size = self.a, self.shape.value_size
        sink = T.Bind(get(a.sinks, self.head * a.group_size + self.group))
        put(self.top, T.max(sink, T.float32(NEVER)), 0)
        put(self.share, T.Select(sink > T.float32(NEVER), T.float32(1), T.float32(0)), 0)
        with loop(out_size // LANES) as i:
            store(self.total, FLOATS.of(0.0), i * LANES, lanes=LANES)
        with loop(a.splits) as split:
            self._add_split((self.b, split, self.head, self.row))
        with loop(opaque(T.shift_right(a.exact + (SPAN - 1), T.int64(8)))) as step:
            start = T.Bind(step * SPAN)
            self._add_tokens(start, opaque(T.min(a.exact - start, T.int64(SPAN))))
        seen = self.share[0] > T.float32(0)
        factor = T.Bind(T.Select(seen, T.float32(1) / self.share[0], T.float32(0)))
        with loop(out_size // LANES) as i:
            value = load(self.total, i * LANES, lanes=LANES) * FLOATS.of(factor)
            store(a.out, value, self.b, self.head, self.row, i * LANES, lanes=LANES)

    def _raise_top(self, top: Expr) -> tuple[Expr, Expr]:
        """The new maximum, and the factor of what was summed under the old one."""
        now = T.Bind(T.max(self.top[0], top))
        factor = T.Bind(T.exp(self.top[0] - now))
        put(self.top, now, 0)
        return now, factor

    def _add_split(self, at: tuple[Expr, ...]) -> None:
        top = T.Bind(get(self.a.softmax, *at, 0))
        now, old = self._raise_top(top)
        new = T.Bind(T.exp(top - now))
        put(self.share, self.share[0] * old + get(self.a.softmax, *at, 1) * new, 0)
        with loop(self.shape.value_size // LANES) as i:
            before = load(self.total, i * LANES, lanes=LANES) * FLOATS.of(old)
            part = load(self.a.sums, *at, i * LANES, lanes=LANES)
            store(self.total, FLOATS.fma(part, FLOATS.of(new), before), i * LANES, lanes=LANES)

    def _add_tokens(self, start: Expr, count: Expr) -> None:
        a, size = self.a, self.shape.key_size
        scores = local((SPAN,))
        with loop(count) as token:
            sums = Registers(2, "float32", LANES)
            with loop(size // (2 * LANES)) as i:
                for part in (0, 1):
                    at = (i * 2 + part) * LANES
                    q = load(a.q, self.b, self.head, self.row, at, lanes=LANES)
                    k = self._exact(a.exact_key, start + token, at)
                    sums[part] = FLOATS.fma(q, k, sums[part])
            mask = T.max(get(a.exact_mask, self.b, self.query, start + token), T.float32(UNSEEN))
            put(
                scores,
                T.max(FLOATS.total(sums[0] + sums[1]) * a.scale, T.float32(NEVER)) + mask,
                token,
            )
        chunks = opaque(T.shift_right(count + (LANES - 1), T.int64(3)))
        with loop(chunks * LANES, count) as token:
            put(scores, T.float32(UNSEEN), token)
        top, share = Registers(1, "float32", LANES), Registers(1, "float32", LANES)
        top[0] = FLOATS.of(NEVER)
        with loop(chunks) as i:
            top[0] = FLOATS.max(top[0], load(scores, i * LANES, lanes=LANES))
        now, old = self._raise_top(FLOATS.largest(top[0]))
        with loop(chunks) as i:
            p = FLOATS.exp(load(scores, i * LANES, lanes=LANES) - FLOATS.of(now))
            store(scores, p, i * LANES, lanes=LANES)
            share[0] = share[0] + p
        put(self.share, self.share[0] * old + FLOATS.total(share[0]), 0)
        vectors = 4 if self.shape.value_size % (4 * LANES) == 0 else 2
        with loop(self.shape.value_size // (vectors * LANES)) as group:
            places = [(group * vectors + v) * LANES for v in range(vectors)]
            sums = Registers(vectors, "float32", LANES)
            for v, at in enumerate(places):
                sums[v] = load(self.total, at, lanes=LANES) * FLOATS.of(old)
            with loop(count) as token:
                p = T.Bind(FLOATS.of(get(scores, token)))
                for v, at in enumerate(places):
                    value = self._exact(a.exact_value, start + token, at)
                    sums[v] = FLOATS.fma(value, p, sums[v])
            for v, at in enumerate(places):
                store(self.total, sums[v], at, lanes=LANES)

    def _exact(self, tensor: Any, token: Expr, at: Expr) -> Expr:
        return load_float(tensor, self.b, self.head, token, at, lanes=LANES)
