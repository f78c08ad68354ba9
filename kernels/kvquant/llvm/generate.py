"""Attention of few queries to a packed body and exact tokens: the kernel for processors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.llvm import simd
from regraft.kernels.kvquant.llvm.exact import combine
from regraft.kernels.kvquant.llvm.keys import FixedKeys
from regraft.kernels.kvquant.llvm.outliers import Outliers
from regraft.kernels.kvquant.llvm.plain import PlainKeys, PlainValues
from regraft.kernels.kvquant.llvm.simd import (
    X86,
    Expr,
    Floats,
    Registers,
    divided,
    fill,
    get,
    load,
    local,
    loop,
    opaque,
    parallel,
    put,
    store,
)
from regraft.kernels.kvquant.llvm.values import FixedValues

TOKENS, BLOCKS = 32, 8
SPAN = TOKENS * BLOCKS
"""Tokens of a step of the online softmax."""
NEVER = -1e30


@dataclass(frozen=True)
class Shape:
    """What a kernel is generated for; rows: query rows of a tile, at most 4."""

    level: str
    heads: int
    key_size: int
    value_size: int
    key_bits: int
    value_bits: int
    rows: int
    rotated: bool
    key_outliers: bool
    value_outliers: bool
    exact_dtype: str


def make(shape: Shape) -> Any:
    """The PrimFunc ``attend`` of a shape; its arguments are those of ``_arguments``, in order."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("attend")
            a = _arguments(shape)
            a.group_size = opaque(T.truncdiv(a.query_heads, T.int64(shape.heads)))
            a.rows = opaque(a.group_size * a.queries)
            for name in ("q", "out"):
                _by_rows(a, name, shape)
            with parallel(a.batch * a.splits) as task:
                _Body(shape, a, task).run()
            combine(shape, a)
    return builder.get().with_attr("global_symbol", "attend")


def keys_of(shape: Shape) -> FixedKeys | PlainKeys:
    settings = (shape.key_size, shape.key_bits, shape.rows, shape.rotated)
    return (
        PlainKeys(*settings)
        if shape.level == "portable"
        else FixedKeys(X86(shape.level), *settings)
    )


def values_of(shape: Shape) -> FixedValues | PlainValues:
    settings = (shape.value_size, shape.value_bits, shape.rows)
    return (
        PlainValues(*settings)
        if shape.level == "portable"
        else FixedValues(X86(shape.level), *settings)
    )


def _by_rows(a: Any, name: str, shape: Shape) -> None:
    """View a tensor [B, Hq, S, *] as [B, H, rows, *]."""
    buffer = getattr(a, name)
    dims = (a.batch, T.int64(shape.heads), a.rows, buffer.shape[3])
    setattr(a, name, T.decl_buffer(dims, buffer.dtype, data=buffer.data, align=4))


class _Arguments:
    pass


def _arguments(shape: Shape) -> Any:
    a: Any = _Arguments()
    batch, groups, scales = (T.int64() for _ in range(3))
    query_heads, queries, padded, splits, angles = (T.int64() for _ in range(5))
    exact, words_k, words_v = (T.int64() for _ in range(3))
    heads, size, out_size = shape.heads, shape.key_size, shape.value_size

    def tensor(name: str, dims: tuple[Any, ...], dtype: str) -> None:
        setattr(a, name, simd.tensor(name, dims, dtype))

    def scalar(name: str, dtype: str) -> None:
        setattr(a, name, T.arg(name, getattr(T, dtype)()))

    a.batch, a.padded, a.queries, a.splits = batch, padded, queries, splits
    a.query_heads, a.exact, a.scales, a.angles = query_heads, exact, scales, angles
    tensor("q", (batch, query_heads, queries, size), "float32")
    tensor("out", (batch, query_heads, queries, out_size), "float32")
    tensor("first", (batch, queries), "int32")
    scalar("blocks", "int64")
    scalar("group", "int64")
    scalar("scale", "float32")
    for side, bits, width in (("key", shape.key_bits, size), ("value", shape.value_bits, out_size)):
        code_bytes = TOKENS * width * bits // 8
        tensor(f"{side}_codes", (batch, heads, T.int64(), code_bytes), "uint8")
        tensor(f"{side}_levels", (2**bits,), "int8")
        scalar(f"{side}_unit", "float32")
    for part in ("scale", "zero"):
        tensor(f"key_{part}", (scales, heads, groups, size), "float16")
        tensor(f"value_{part}", (batch, T.int64(), TOKENS), "float16")
    if shape.rotated:
        tensor("rotation", (angles, T.int64(), size * TOKENS), "int16")
    for side, words in (("key", words_k), ("value", words_v)):
        if getattr(shape, f"{side}_outliers"):
            tensor(f"{side}_outliers", (batch, T.int64(), words), "int32")
            tensor(f"{side}_offsets", (batch, T.int64(), heads + 1), "int32")
    for name, width in (("exact_key", size), ("exact_value", out_size)):
        setattr(a, name, simd.strided(name, (batch, heads, exact, width), shape.exact_dtype))
    tensor("exact_mask", (batch, queries, exact), "float32")
    tensor("sinks", (query_heads,), "float32")
    tensor("sums", (batch, splits, heads, padded, out_size), "float32")
    tensor("softmax", (batch, splits, heads, padded, 2), "float32")
    tensor("scores", (batch, splits, padded, SPAN), "float32")
    tables, query = keys_of(shape).table, keys_of(shape).query
    tensor("tables", (batch, splits, heads, size, tables[1]), tables[0])
    tensor("fixed", (batch, splits, heads, padded, query[1]), query[0])
    tensor("units", (batch, splits, heads, padded), "float32")
    if shape.key_outliers:
        tensor("turned", (batch, splits, heads, T.int64(), size, 8), "float32")
    return a


class _Body:
    """One task: some of the body's blocks of one sequence, all heads."""

    def __init__(self, shape: Shape, a: Any, task: Expr) -> None:
        self.shape, self.a = shape, a
        self.floats = Floats(16 if shape.level == "avx512" else 8)
        self.keys, self.values = keys_of(shape), values_of(shape)
        self.b, self.split = divided(task, a.splits)
        self.me = (self.b, self.split)

    def run(self) -> None:
        a, shape = self.a, self.shape
        steps = opaque(T.shift_right(a.blocks + (BLOCKS - 1), T.int64(3)))
        start, stop = (
            opaque(T.min(divided(steps * n, a.splits)[0] * BLOCKS, a.blocks))
            for n in (self.split, self.split + 1)
        )
        self._reset()
        self._levels()
        self.scratch = self.keys.scratch()
        self.block_scale, self.block_zero = local((SPAN,)), local((SPAN,))
        sizes = (shape.key_size, shape.value_size)
        self.outliers = Outliers(*sizes, shape.rows, shape.rotated)
        self.tiles = divided(a.padded, shape.rows)[0]
        if shape.key_outliers:
            self._turn_queries()
        with loop(opaque(T.shift_right(stop - start + (BLOCKS - 1), T.int64(3)))) as step:
            block = opaque(start + step * BLOCKS)
            count = opaque(T.min(stop - block, T.int64(BLOCKS)))
            self._value_scales(block, count)
            with loop(shape.heads) as head:
                with loop(count) as j:
                    self._score(head, block + j, j, start)
                with loop(self.tiles) as tile:
                    row = T.Bind(tile * shape.rows)
                    if shape.key_outliers:
                        self._key_outliers(head, block, count, tile, row)
                    self._softmax(head, block, count, row)
                    self._accumulate(head, block, count, row)
                    if shape.value_outliers:
                        self.outliers.add_to_sums(
                            a.value_outliers, a.value_offsets, (self.b, block), head, count,
                            a.scores, (*self.me, row), a.sums, (*self.me, head, row),
                        )  # fmt: skip

    def _reset(self) -> None:
        a, floats = self.a, self.floats
        with loop(self.shape.heads) as head, loop(a.padded) as row:
            put(a.softmax, T.float32(NEVER), *self.me, head, row, 0)
            put(a.softmax, T.float32(0), *self.me, head, row, 1)
            with loop(self.shape.value_size // floats.lanes) as i:
                at = i * floats.lanes
                store(a.sums, floats.of(0.0), *self.me, head, row, at, lanes=floats.lanes)

    def _levels(self) -> None:
        """Float levels of keys; raised levels of values, as bytes."""
        a, shape = self.a, self.shape
        self.key_levels = local((16,))
        self.value_levels = local((16,), "uint8")
        with loop(16) as i:
            key = get(a.key_levels, T.bitwise_and(i, T.int64(2**shape.key_bits - 1)))
            put(self.key_levels, T.Cast("float32", key) * a.key_unit, i)
            value = get(a.value_levels, T.bitwise_and(i, T.int64(2**shape.value_bits - 1)))
            raised = T.Cast("int32", value) - T.Cast("int32", get(a.value_levels, 0))
            put(self.value_levels, T.Cast("uint8", raised), i)
        lowest = T.Cast("float32", get(a.value_levels, 0))
        self.lowest = T.Bind(lowest)

    def _value_scales(self, block: Expr, count: Expr) -> None:
        with loop(count) as j, loop(TOKENS // 8) as i:
            for source, target in (
                (self.a.value_scale, self.block_scale),
                (self.a.value_zero, self.block_zero),
            ):
                halves = load(source, self.b, block + j, i * 8, lanes=8)
                store(target, T.Cast("float32x8", halves), j * TOKENS + i * 8, lanes=8)

    def _query(self, head: Expr) -> Any:
        def query(row: Expr, channel: Expr, lanes: int) -> Expr:
            clipped = T.min(row, self.a.rows - 1)
            return load(self.a.q, self.b, head, clipped, channel, lanes=lanes)

        return query

    def _turn_queries(self) -> None:
        with loop(self.shape.heads) as head, loop(self.tiles) as tile:
            q = self._query(head)
            where = (*self.me, head, tile)
            self.outliers.turn(lambda row, channel: q(row, channel, 1), self.a.scale, self.a.turned,
                               where, tile * self.shape.rows)  # fmt: skip

    def _key_outliers(self, head: Expr, block: Expr, count: Expr, tile: Expr, row: Expr) -> None:
        a = self.a
        rotation, angle = self._rotation()
        self.outliers.add_to_scores(
            a.key_outliers, a.key_offsets, (self.b, block), head, count, rotation, angle,
            a.turned, (*self.me, head, tile), a.scores, (*self.me, row),
        )  # fmt: skip

    def _rotation(self) -> tuple[Any, Expr]:
        if not self.shape.rotated:
            return None, None
        return self.a.rotation, opaque(T.min(self.b, self.a.angles - 1))

    def _score(self, head: Expr, block: Expr, j: Expr, start: Expr) -> None:
        """Raw scores of one block for all rows; tables anew where a group begins."""
        a, where = self.a, (*self.me, head)
        group, offset = divided(block, a.group)
        fresh = opaque(T.Or(offset == T.int64(0), block == start), "bool")
        with T.If(fresh), T.Then():
            at = (opaque(T.min(self.b, a.scales - 1)), head, group)
            self.keys.prepare(self.key_levels, a.key_scale, a.key_zero, at, self._query(head),
                              a.tables, a.fixed, a.units, where, a.padded, a.scale)  # fmt: skip
        rotation, angle = self._rotation()
        self.keys.unpack(a.key_codes, (self.b, head, block), a.tables, where, rotation,
                         (angle, block), self.scratch)  # fmt: skip
        with loop(self.tiles) as tile:
            self.keys.score(self.scratch, a.fixed, a.units, where, tile * self.shape.rows,
                            a.scores, self.me, j * TOKENS)  # fmt: skip

    def _softmax(self, head: Expr, block: Expr, count: Expr, row: Expr) -> None:
        """Turn scores into weights; fold the scales of values in and round them to int16."""
        a, shape, floats = self.a, self.shape, self.floats
        lanes, chunks = floats.lanes, T.Bind(count * (TOKENS // floats.lanes))
        self.weights = local((shape.rows, SPAN // 2), "int32")
        self.alpha, self.gain, self.shift = (local((4,)) for _ in range(3))
        scaled = local((SPAN,))
        with loop(shape.rows) as r:
            at = (*self.me, row + r)
            query = divided(T.min(row + r, a.rows - 1), a.queries)[1]
            first = T.Cast("int64", get(a.first, self.b, query)) - block * TOKENS
            first = opaque(T.Cast("int32", T.min(first, T.int64(SPAN))), "int32")
            with T.If(first > 0), T.Then(), loop(chunks) as i:
                index = T.ramp(T.Cast("int32", i * lanes), 1, lanes)
                old = load(a.scores, *at, i * lanes, lanes=lanes)
                seen = index >= fill(first, "int32", lanes)
                masked = T.Select(seen, old, floats.of(-3e38))
                store(a.scores, masked, *at, i * lanes, lanes=lanes)
            top = Registers(1, "float32", lanes)
            top[0] = floats.of(NEVER)
            with loop(chunks) as i:
                top[0] = floats.max(top[0], load(a.scores, *at, i * lanes, lanes=lanes))
            state = (*self.me, head, row + r)
            before = T.Bind(get(a.softmax, *state, 0))
            now = T.Bind(T.max(before, floats.largest(top[0])))
            put(a.softmax, now, *state, 0)
            alpha = T.Bind(T.exp(before - now))
            put(self.alpha, alpha, r)
            total, zeros, largest = (Registers(1, "float32", lanes) for _ in range(3))
            with loop(chunks) as i:
                p = floats.exp(load(a.scores, *at, i * lanes, lanes=lanes) - floats.of(now))
                store(a.scores, p, *at, i * lanes, lanes=lanes)
                total[0] = total[0] + p
                zero = load(self.block_zero, i * lanes, lanes=lanes)
                zeros[0] = floats.fma(p, zero, zeros[0])
                weight = T.Bind(p * load(self.block_scale, i * lanes, lanes=lanes))
                store(scaled, weight, i * lanes, lanes=lanes)
                largest[0] = floats.max(largest[0], weight)
            put(a.softmax, get(a.softmax, *state, 1) * alpha + floats.total(total[0]), *state, 1)
            unit = T.Bind(T.max(floats.largest(largest[0]), T.float32(1e-30)) / T.float32(32767))
            whole = Registers(1, "float32", lanes)
            with loop(chunks) as i:
                weight = load(scaled, i * lanes, lanes=lanes)
                rounded = floats.round(weight * floats.of(T.float32(1) / unit))
                whole[0] = whole[0] + rounded
                ints = T.Cast(f"int16x{lanes}", T.Cast(floats.ints, rounded))
                pairs = T.reinterpret(f"int32x{lanes // 2}", ints)
                store(self.weights, pairs, r, i * (lanes // 2), lanes=lanes // 2)
            gain = T.Bind(unit * a.value_unit)
            put(self.gain, gain, r)
            shift = gain * self.lowest * floats.total(whole[0]) + floats.total(zeros[0])
            put(self.shift, shift, r)

    def _accumulate(self, head: Expr, block: Expr, count: Expr, row: Expr) -> None:
        a, floats = self.a, self.floats

        def finish(r: int, channel: Expr, sums: Expr) -> None:
            at = (*self.me, head, row + r, channel)
            alpha, gain, shift = (get(x, r) for x in (self.alpha, self.gain, self.shift))
            old = load(a.sums, *at, lanes=floats.lanes)
            value = floats.fma(T.Cast(floats.dtype, sums), floats.of(gain), floats.of(shift))
            store(a.sums, floats.fma(old, floats.of(alpha), value), *at, lanes=floats.lanes)

        self.values.accumulate(a.value_codes, (self.b, head), block, count, self.value_levels,
                               self.weights, finish)  # fmt: skip
