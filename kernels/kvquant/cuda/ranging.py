"""The CUDA kernels that find the ranges of values, and which numbers are kept beside their codes.

The k-th largest of n words is found bit by bit from the highest down: a bit is set where at least
k words are no smaller. Of equal ones the first are chosen, up to a place that is found likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from regraft.kernels.device import (
    Expr,
    call,
    let,
    registers,
    store,
    vector,
    wide,
    wide_row,
)
from regraft.kernels.kvquant.cuda.plan import Coded
from regraft.kernels.kvquant.layout import BLOCK

Test = Callable[[Expr, Expr], Expr]
THREADS = 1024
LIMIT = 65504.0
FLIPS = (T.uint32(2**32 - 1), T.uint32(0))
"""What turns words around, so that the smallest are the largest, and what does not."""


def build(case: Coded) -> Any:
    """The kernel: x, scale, zero, midpoints, levels, weight, y, errors, exact, then sizes.

    x, y and errors float32 [B, H, 32 * blocks, D]; exact uint8 like them; scale and zero float16,
    of keys [rows, H, groups, D], given, of values [B, 32 * blocks], written. weight float16
    [H, D], what the errors of keys count. Sizes: batch, blocks and, of keys, rows and groups.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("kvquant_ranges")
        a = Arguments()
        if case.kind == "value":
            with (
                T.launch_thread("blockIdx.x", a.blocks * BLOCK) as token,
                T.launch_thread("blockIdx.y", a.batch) as row,
                T.launch_thread("threadIdx.x", 32) as lane,
            ):
                Values(case, a, token, row, lane).emit()
        else:
            with (
                T.launch_thread("blockIdx.x", a.blocks) as block,
                T.launch_thread("blockIdx.y", a.batch) as row,
                T.launch_thread("threadIdx.x", THREADS) as thread,
            ):
                Keys(case, a, block, row, thread).emit()
    return builder.get().with_attr("global_symbol", "kvquant_ranges").with_attr("s_tir", False)


class Arguments:
    """The parameters in order; tensors are flat."""

    def __init__(self) -> None:
        self.x = vector("x", "float32")
        self.scale, self.zero = vector("scale", "float16"), vector("zero", "float16")
        self.midpoints, self.levels = vector("midpoints", "float32"), vector("levels", "float32")
        self.weight = vector("weight", "float16")
        self.y, self.errors = vector("y", "float32"), vector("errors", "float32")
        self.exact = vector("exact", "uint8")
        self.batch, self.blocks, self.rows, self.groups = (
            T.arg(name, T.int32()) for name in ("batch", "blocks", "rows", "groups")
        )


def normalised(x: Expr, scale: Expr, zero: Expr) -> Expr:
    safe = T.if_then_else(scale == T.float32(0), T.float32(1), scale)
    return call("divide", x - zero, safe)


def _half(x: Expr) -> Expr:
    """float16 x / 2, not infinite."""
    half = T.max(T.min(x * T.float32(0.5), T.float32(LIMIT)), T.float32(-LIMIT))
    return T.Bind(T.cast(half, "float16"))


def search(y: Expr, midpoints: Any, levels: int) -> Expr:
    """How many midpoints lie below y."""
    code = T.int32(0)
    for i in range(levels - 1):
        code = code + T.cast(midpoints[i] < y, "int32")
    return let(code)


def key_scale(case: Coded, a: Any, row: Expr, token: Expr, channel: Expr) -> Expr:
    """Where the scale of a key lies; channel: of all heads."""
    group = token // (a.blocks * BLOCK // a.groups)
    head = row % a.rows * case.heads + channel // case.size
    return let((head * a.groups + group) * case.size + channel % case.size)


class Ranking:
    """The largest of ``many`` words."""

    def __init__(self, many: int) -> None:
        self.many = many

    def count(self, test: Test) -> Expr:
        """How many words pass, given each with its place; known to all threads."""
        raise NotImplementedError

    def largest(self, k: int) -> Expr:
        """The k-th largest word."""
        found = registers(1, "uint32")
        store(found, 0, T.uint32(0))
        with _bits(32) as bit:
            candidate = let(found[0] | T.uint32(1) << T.cast(bit, "uint32"))
            with T.If(self.count(lambda word, _: word >= candidate) >= k), T.Then():
                store(found, 0, candidate)
        return let(found[0])

    def first(self, k: int, least: Expr) -> Test:
        """Whether a word is among the k largest, none of which is below ``least``."""
        need = let(k - self.count(lambda word, _: word > least))
        equal = self.count(lambda word, _: word == least)
        end = registers(1, "int32")
        store(end, 0, T.if_then_else(need > 0, T.int32(self.many), T.int32(0)))
        with T.If(T.And(need > 0, equal > need)), T.Then():
            store(end, 0, T.int32(0))
            with _bits(self.many.bit_length()) as bit:
                to = let(end[0] | T.int32(1) << bit)
                before = self.count(lambda word, place: T.And(word == least, place < to))
                with T.If(before <= need), T.Then():
                    store(end, 0, to)
        stop = let(end[0])
        return lambda word, place: T.Or(word > least, T.And(word == least, place < stop))


@contextmanager
def _bits(count: int) -> Iterator[Expr]:
    """A loop over bits, the highest first."""
    bit = registers(1, "int32")
    store(bit, 0, T.int32(count - 1))
    with T.While(bit[0] >= 0):
        yield let(bit[0])
        store(bit, 0, bit[0] - 1)


class Values(Ranking):
    """A warp that ranges the values of a token, all heads together."""

    def __init__(self, case: Coded, a: Arguments, token: Expr, row: Expr, lane: Expr) -> None:
        super().__init__(case.channels)
        self.case, self.a = case, a
        self.token, self.row, self.lane = token, row, lane
        self.words = T.alloc_buffer((case.channels,), "uint32", scope="shared")
        self.flip = T.uint32(0)

    def emit(self) -> None:
        case, a = self.case, self.a

        def load(channel: Expr) -> None:
            store(self.words, channel, call("ordered", a.x[self._at(channel)]))

        self._each(load)
        call("sync_warp")
        ends: list[Expr] = []
        chosen: list[Test] = []
        counts = (case.count // 2, case.count - case.count // 2)
        if case.count < case.channels:
            for self.flip, count in zip(FLIPS, counts, strict=True):
                least = self.largest(count + 1)
                ends.append(call("unordered", least ^ self.flip))
                chosen.append(self.first(count, least))
        low, high = ends or (T.float32(0), T.float32(0))
        scale, zero = _half(high - low), _half(high + low)
        with T.If(self.lane == 0), T.Then():
            at = let(self.row * a.blocks * BLOCK + self.token)
            store(a.scale, at, scale)
            store(a.zero, at, zero)
        wide_scale, wide_zero = let(T.cast(scale, "float32")), let(T.cast(zero, "float32"))

        def write(channel: Expr) -> None:
            at, word = self._at(channel), let(self.words[channel])
            store(a.y, at, normalised(call("unordered", word), wide_scale, wide_zero))
            if case.count:
                exact = T.uint8(1)
                if chosen:
                    tests = zip(chosen, FLIPS, strict=True)
                    either = T.Or(*(test(let(word ^ flip), channel) for test, flip in tests))
                    exact = T.cast(either, "uint8")
                store(a.exact, at, exact)

        self._each(write)

    def count(self, test: Test) -> Expr:
        total = registers(1, "int32")
        store(total, 0, T.int32(0))

        def add(channel: Expr) -> None:
            passes = test(let(self.words[channel] ^ self.flip), channel)
            store(total, 0, total[0] + T.cast(passes, "int32"))

        self._each(add)
        return call("warp_total", total[0])

    def largest(self, k: int) -> Expr:
        if k > 1:
            return super().largest(k)
        top = registers(1, "uint32")
        store(top, 0, T.uint32(0))
        self._each(lambda channel: store(top, 0, T.max(top[0], self.words[channel] ^ self.flip)))
        return call("warp_max_word", top[0])

    def _at(self, channel: Expr) -> Expr:
        case = self.case
        head = self.row * case.heads + channel // case.size
        token = wide_row(head) * wide(self.a.blocks * BLOCK) + wide(self.token)
        return let(token * case.size + wide(channel % case.size))

    def _each(self, do: Callable[[Expr], None]) -> None:
        with T.serial(0, -(-self.case.channels // 32)) as i:
            channel = let(i * 32 + self.lane)
            with T.If(channel < self.case.channels), T.Then():
                do(channel)


class Keys(Ranking):
    """Threads that find the outliers of a block of 32 tokens of keys, all heads together."""

    def __init__(self, case: Coded, a: Arguments, block: Expr, row: Expr, thread: Expr) -> None:
        super().__init__(BLOCK * case.channels)
        self.case, self.a = case, a
        self.block, self.row, self.thread = block, row, thread
        self.counts = T.alloc_buffer((THREADS // 32,), "int32", scope="shared")

    def emit(self) -> None:
        case, a = self.case, self.a

        def measure(place: Expr, at: Expr) -> None:
            token, channel = let(place // case.channels), let(place % case.channels)
            of = key_scale(case, a, self.row, self.block * BLOCK + token, channel)
            scale, zero = let(T.cast(a.scale[of], "float32")), let(T.cast(a.zero[of], "float32"))
            x = let(a.x[at])
            y = normalised(x, scale, zero)
            store(a.y, at, y)
            if case.count:
                level = a.levels[search(y, a.midpoints, 2**case.bits)]
                error = let(T.abs(x - call("add_product", zero, level, scale)))
                if case.feedback:
                    error = error * T.cast(a.weight[channel], "float32")
                store(a.errors, at, error)

        self._each(measure)
        if not case.count:
            return
        chosen = self.first(BLOCK * case.count, self.largest(BLOCK * case.count))

        def mark(place: Expr, at: Expr) -> None:
            word = call("as_word", a.errors[at])
            exact = T.And(word > T.uint32(0), chosen(word, place))
            store(a.exact, at, T.cast(exact, "uint8"))

        self._each(mark)

    def count(self, test: Test) -> Expr:
        total = registers(1, "int32")
        store(total, 0, T.int32(0))

        def add(place: Expr, at: Expr) -> None:
            passes = test(call("as_word", self.a.errors[at]), place)
            store(total, 0, total[0] + T.cast(passes, "int32"))

        self._each(add)
        warp = call("warp_total", total[0])
        T.evaluate(T.tvm_storage_sync("shared"))
        with T.If(self.thread % 32 == 0), T.Then():
            store(self.counts, self.thread // 32, warp)
        T.evaluate(T.tvm_storage_sync("shared"))
        every = T.int32(0)
        for i in range(THREADS // 32):
            every = every + self.counts[i]
        return let(every)

    def _each(self, do: Callable[[Expr, Expr], None]) -> None:
        """Do something with each number of this thread: its place by token, head and channel, and
        where it lies."""
        with T.serial(0, -(-self.many // THREADS)) as i:
            place = let(i * THREADS + self.thread)
            with T.If(place < self.many), T.Then():
                self._do(place, do)

    def _do(self, place: Expr, do: Callable[[Expr, Expr], None]) -> None:
        case = self.case
        channel = let(place % case.channels)
        head = self.row * case.heads + channel // case.size
        token = self.block * BLOCK + place // case.channels
        row = wide_row(head) * wide(self.a.blocks * BLOCK) + wide(token)
        do(place, let(row * case.size + wide(channel % case.size)))
