"""The kernel for CUDA: split keys and values (Flash-Decoding), a block of 32 tokens a warp."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from regraft.kernels.attention.cuda import Case
from regraft.kernels.attention.flash import (
    BLOCK,
    LOG2E,
    Flash,
    Warp,
    dense_channel,
    dense_query,
    dense_scores,
    dense_values,
    merge,
)
from regraft.kernels.device import Expr, call, let, registers, store, vector, wide


def build(case: Case, warps: int) -> Any:
    """The kernel, with warps of a block of threads side by side in the tokens."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("dense_attend")
        a, tile = Arguments(case), 8 * case.tiles
        with (
            T.launch_thread("blockIdx.x", a.splits) as split,
            T.launch_thread("blockIdx.y", (a.rows + tile - 1) // tile) as place,
            T.launch_thread("blockIdx.z", a.batch * a.heads) as line,
            T.launch_thread("threadIdx.x", warps * 32) as thread,
        ):
            Attend(case, warps, a, split, place, line, thread).emit()
        merge(
            *(a.partial, a.sinks, a.out, case.dtype, a.rows, a.queries),
            *(case.value_size, a.heads, a.batch, a.splits * warps),
        )
    return builder.get().with_attr("global_symbol", "dense_attend").with_attr("s_tir", False)


class Arguments:
    """The parameters in order; tensors are flat."""

    def __init__(self, case: Case) -> None:
        self.q, self.key, self.value = (vector(name, case.dtype) for name in ("q", "key", "value"))
        self.position, self.mask = vector("position", "int64"), vector("mask", "uint8")
        self.sinks = vector("sinks", "float32")
        self.partial = tuple(vector(name, "float32") for name in ("outputs", "tops", "sums"))
        self.out = vector("out", case.dtype)
        for name in (
            *("batch", "heads", "groups", "queries", "splits", "length", "window"),
            *("key_room", "value_room", "masked", "mask_batch", "mask_row"),
        ):
            setattr(self, name, T.arg(name, T.int32()))
        self.scale, self.softcap = (T.arg(name, T.float32()) for name in ("scale", "softcap"))

    @property
    def rows(self) -> Expr:
        return self.groups * self.queries


class Attend:
    """The code of one thread."""

    def __init__(
        self, case: Case, warps: int, a: Any, split: Expr, place: Expr, line: Expr, thread: Expr
    ) -> None:
        self.case, self.warps, self.a = case, warps, a
        self.warp = Warp(thread)
        self.split, self.line = split, line
        self.batch = let(line // a.heads)
        self.first_row = let(place * (8 * case.tiles))
        self.tokens = let(a.length + T.cast(a.position[0], "int32"))
        self.flash = Flash(self.warp, case.value_size, case.tiles)
        self.query = dense_query(
            *(a.q, wide(line) * (a.rows * case.size), self.first_row, a.rows),
            *(case.size, case.tiles, self.warp),
        )
        self.rows = [
            (tile, e, let((self.first_row + 8 * tile + 2 * self.warp.q + e) % a.queries))
            for tile in range(case.tiles)
            for e in range(2)
        ]

    def emit(self) -> None:
        a, case, flash = self.a, self.case, self.flash
        since = T.max(self.tokens - a.queries + 1 - a.window, 0)
        begin = let(T.if_then_else(a.window > 0, since, 0) // BLOCK)
        count = let((self.tokens + BLOCK - 1) // BLOCK - begin)
        low = begin + count * self.split // a.splits
        high = let(begin + count * (self.split + 1) // a.splits)
        block = registers(1, "int32")
        store(block, 0, low + self.warp.index)
        # no For: TVM would hoist conditions out of it by copying its body, and refuse the copy
        with T.While(block[0] < high):
            self._block(let(block[0] * BLOCK))
            store(block, 0, block[0] + self.warps)
        place = self.line * a.splits * self.warps + self.split * self.warps + self.warp.index
        flash.write(
            *(a.partial, place, self.first_row, a.rows),
            dense_channel(self.warp, case.value_size),
        )

    def _block(self, start: Expr) -> None:
        """Attend to 32 tokens, unless the mask hides them all."""
        own = let(T.min(start + self.warp.lane, self.tokens - 1))
        seen, query = registers(1, "int32"), registers(1, "int32")
        store(seen, 0, T.int32(1) - self.a.masked)
        store(query, 0, T.int32(0))
        with T.While(T.And(self.a.masked > 0, query[0] < self.a.queries)):
            store(seen, 0, seen[0] | T.cast(self._mask(query[0], own), "int32"))
            store(query, 0, query[0] + 1)
        with T.If(call("any", seen[0]) != 0), T.Then():
            self._attend(start)

    def _attend(self, start: Expr) -> None:
        a, case, flash = self.a, self.case, self.flash
        last = let(self.tokens - 1 - start)
        key, value = (
            wide(self.line) * wide(room) + wide(start) for room in (a.key_room, a.value_room)
        )
        dense_scores(flash, case.dtype, a.key, key * case.size, last, self.query, case.size)
        for at in range(8 * case.tiles):
            score = flash.scores[at] * a.scale
            if case.softcap:
                score = call("tanh", score / a.softcap) * a.softcap
            store(flash.scores, at, score * T.float32(LOG2E))
        past = start + BLOCK > self.tokens - a.queries
        gone = T.And(a.window > 0, start < self.tokens - a.window)
        with T.If(T.Or(a.masked > 0, T.Or(past, gone))), T.Then():
            self._hide(start)
        flash.softmax(case.dtype)
        dense_values(flash, case.dtype, a.value, value * case.value_size, last, case.value_size)

    def _hide(self, start: Expr) -> None:
        """Set the scores of tokens that a query does not see to minus infinity."""
        a, flash = self.a, self.flash
        for tile, e, query in self.rows:
            position = let(self.tokens - a.queries + query)
            for i in range(4):
                own = let(start + 8 * i + self.warp.g)
                byte = T.if_then_else(
                    a.masked > 0, self._mask(query, T.min(own, self.tokens - 1)), 0
                )
                seen = T.Or(byte != 0, T.And(a.masked == 0, own <= position))
                seen = T.And(seen, own < self.tokens)
                seen = T.And(seen, T.Or(a.window == 0, own > position - a.window))
                at = tile * 8 + i * 2 + e
                score = T.if_then_else(seen, flash.scores[at], T.float32(float("-inf")))
                store(flash.scores, at, score)

    def _mask(self, query: Any, token: Expr) -> Expr:
        a = self.a
        return a.mask[self.batch * a.mask_batch + query * a.mask_row + token]
