"""The kernel that rotates a token and writes it to the cache."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.llvm.simd import Expr, get, loop, put, tensor


def make(interleaved: bool, offset: int) -> Any:
    """The PrimFunc ``rotate_write``."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("rotate_write")
            queries, heads, size, width, pairs, room = (T.int64() for _ in range(6))
            q = tensor("q", (queries, size), "float32")
            k = tensor("k", (heads, size), "float32")
            v = tensor("v", (heads, width), "float32")
            cos = tensor("cos", (pairs,), "float32")
            sin = tensor("sin", (pairs,), "float32")
            out = tensor("out", (queries, size), "float32")
            key = tensor("key", (heads, room, size), "float32")
            value = tensor("value", (heads, room, width), "float32")
            position = T.arg("position", T.int64())

            def turn(x: Any, head: Expr, target: Any, *place: Expr) -> None:
                with loop(offset) as i:
                    put(target, get(x, head, i), *place, i)
                with loop(pairs) as i:
                    a_at = offset + (2 * i if interleaved else i)
                    b_at = a_at + (1 if interleaved else pairs)
                    a, b = T.Bind(get(x, head, a_at)), T.Bind(get(x, head, b_at))
                    c, s = T.Bind(get(cos, i)), T.Bind(get(sin, i))
                    put(target, a * c - b * s, *place, a_at)
                    put(target, b * c + a * s, *place, b_at)
                with loop(size, offset + 2 * pairs) as i:
                    put(target, get(x, head, i), *place, i)

            with loop(queries) as head:
                turn(q, head, out, head)
            with loop(heads) as head:
                turn(k, head, key, head, position)
                with loop(width) as i:
                    put(value, get(v, head, i), head, position, i)
    return builder.get().with_attr("global_symbol", "rotate_write")
