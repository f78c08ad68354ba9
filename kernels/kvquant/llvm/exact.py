"""The exact tokens and the sinks, merged with the parts of the body."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.llvm.simd import (
    Floats,
    Registers,
    divided,
    get,
    load,
    local,
    loop,
    parallel,
    put,
    store,
)


def combine(shape: Any, a: Any) -> None:
    """out = softmax over the exact tokens, the sinks and the splits of the body, times values."""
    lanes = 8
    floats, size, out_size = Floats(lanes), shape.key_size, shape.value_size
    with parallel(a.batch * shape.heads) as task:
        b, head = divided(task, shape.heads)
        total, top, weight = local((out_size,)), local((1,)), local((1,))
        with loop(a.rows) as row:
            query = divided(row, a.queries)[1]
            put(top, get(a.sinks, head, row), 0)
            put(weight, T.float32(0), 0)
            with T.If(top[0] > T.float32(-3e38)), T.Then():
                put(weight, T.float32(1), 0)
            put(top, T.max(top[0], T.float32(-1e30)), 0)
            with loop(out_size // lanes) as i:
                store(total, floats.of(0.0), i * lanes, lanes=lanes)

            def add(
                score: Any, share: Any, values: Any, top=top, weight=weight, total=total
            ) -> None:
                """Merge sums of values whose softmax has this maximum and this denominator."""
                now = T.Bind(T.max(top[0], score))
                old, new = T.Bind(T.exp(top[0] - now)), T.Bind(T.exp(score - now))
                put(top, now, 0)
                put(weight, weight[0] * old + share * new, 0)
                with loop(out_size // lanes) as i:
                    before = load(total, i * lanes, lanes=lanes) * floats.of(old)
                    merged = floats.fma(values(i * lanes), floats.of(new), before)
                    store(total, merged, i * lanes, lanes=lanes)

            with loop(a.splits) as split:
                at = (b, split, head, row)
                add(
                    T.Bind(get(a.softmax, *at, 0)),
                    get(a.softmax, *at, 1),
                    lambda i, at=at: load(a.sums, *at, i, lanes=lanes),
                )
            with loop(a.exact) as token:
                mask = T.Bind(get(a.exact_mask, b, query, token))
                with T.If(mask > T.float32(-1e30)), T.Then():
                    sums = Registers(1, "float32", lanes)
                    with loop(size // lanes) as i:
                        q = load(a.q, b, head, row, i * lanes, lanes=lanes)
                        k = load(a.exact_key, b, head, token, i * lanes, lanes=lanes)
                        sums[0] = floats.fma(q, T.Cast(floats.dtype, k), sums[0])
                    add(
                        T.Bind(floats.total(sums[0]) * a.scale + mask),
                        T.float32(1),
                        lambda i, token=token: T.Cast(
                            floats.dtype, load(a.exact_value, b, head, token, i, lanes=lanes)
                        ),
                    )
            seen = weight[0] > T.float32(0)
            share = T.Bind(T.Select(seen, T.float32(1) / weight[0], T.float32(0)))
            with loop(out_size // lanes) as i:
                value = load(total, i * lanes, lanes=lanes) * floats.of(share)
                store(a.out, value, b, head, row, i * lanes, lanes=lanes)
