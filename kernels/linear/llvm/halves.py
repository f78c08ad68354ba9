"""Products with weights of half precision as they lie, rows in memory one after the other."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.llvm.simd import (
    Floats,
    Registers,
    divided,
    get,
    load,
    load_float,
    loop,
    opaque,
    parallel,
    put,
    tensor,
)

CHANNELS = 4
"""Rows of weights that an activation meets at once."""


def make(level: str, dtype: str, rows: int, bias: bool) -> Any:
    """The PrimFunc ``half_linear``: out = x times the weights, plus bias; for columns that the
    vector divides. rows: activations that weights meet at once."""
    floats = Floats(16 if level == "avx512" else 8)
    lanes = floats.lanes
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("half_linear")
            count, columns, channels = (T.int64() for _ in range(3))
            x = tensor("x", (count, columns), "float32")
            weight = tensor("weight", (channels, columns), dtype)
            out = tensor("out", (count, channels), "float32")
            added = tensor("bias", (channels,), "float32") if bias else None
            steps = divided(columns, lanes)[0]
            turns = divided(count + (rows - 1), rows)[0]
            with parallel(divided(channels + (CHANNELS - 1), CHANNELS)[0]) as tile:
                own = [opaque(T.min(tile * CHANNELS + c, channels - 1)) for c in range(CHANNELS)]
                with loop(turns) as turn:
                    places = [opaque(T.min(turn * rows + r, count - 1)) for r in range(rows)]
                    sums = Registers(rows * CHANNELS, "float32", lanes)
                    with loop(steps) as step:
                        at = T.Bind(step * lanes)
                        given = [load(x, place, at, lanes=lanes) for place in places]
                        for c, channel in enumerate(own):
                            w = load_float(weight, channel, at, lanes=lanes)
                            for r, value in enumerate(given):
                                i = r * CHANNELS + c
                                sums[i] = floats.fma(w, value, sums[i])
                    for r, place in enumerate(places):
                        for c, channel in enumerate(own):
                            more = T.float32(0) if added is None else get(added, channel)
                            put(out, floats.total(sums[r * CHANNELS + c]) + more, place, channel)
    return builder.get().with_attr("global_symbol", "half_linear")
