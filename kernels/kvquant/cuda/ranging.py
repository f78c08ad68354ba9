"""The CUDA kernels that find the ranges of values, and which numbers are kept beside their codes.

The k-th largest of n numbers is found bit by bit from the highest down: a bit is set where at
least k numbers are no smaller. Equal numbers are told apart by their places, the first wins.
"""

from __future__ import annotations

from collections.abc import Callable
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

THREADS = 256
LIMIT = 65504.0


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
    return let((x - zero) / safe)


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


class Ranked:
    """Numbers told apart by their places, of which there are ``many``."""

    def __init__(self, many: int) -> None:
        self.low = max(1, (many - 1).bit_length())

    def rank(self, word: Expr, place: Expr) -> Expr:
        last = T.uint64(2**self.low - 1)
        return T.cast(word, "uint64") << T.uint64(self.low) | (last - T.cast(place, "uint64"))

    def place(self, rank: Expr) -> Expr:
        last = T.uint64(2**self.low - 1)
        return let(T.cast(last - (rank & last), "int32"))

    def largest(self, k: int, count: Callable[[Expr], Expr]) -> Expr:
        """The k-th largest rank; count(rank): how many are no smaller, known to all threads."""
        found, bit = registers(1, "uint64"), registers(1, "int32")
        store(found, 0, T.uint64(0))
        store(bit, 0, T.int32(31 + self.low))
        with T.While(bit[0] >= 0):
            candidate = let(found[0] | T.uint64(1) << T.cast(bit[0], "uint64"))
            with T.If(count(candidate) >= k), T.Then():
                store(found, 0, candidate)
            store(bit, 0, bit[0] - 1)
        return let(found[0])


class Values(Ranked):
    """A warp that ranges the values of a token, all heads together."""

    def __init__(self, case: Coded, a: Arguments, token: Expr, row: Expr, lane: Expr) -> None:
        super().__init__(case.channels)
        self.case, self.a = case, a
        self.token, self.row, self.lane = token, row, lane
        self.x = T.alloc_buffer((case.channels,), "float32", scope="shared")

    def emit(self) -> None:
        case, a = self.case, self.a

        def load(channel: Expr) -> None:
            store(self.x, channel, a.x[self._at(channel)])

        self._each(load)
        call("sync_warp")
        high, low = case.count - case.count // 2, case.count // 2
        ends, ranks = [T.float32(0), T.float32(0)], []
        if case.count < case.channels:
            ranks = [self._largest(low + 1, -1), self._largest(high + 1, 1)]
            ends = [let(self.x[self.place(rank)]) for rank in ranks]
        zero, scale = (
            T.cast(
                T.max(T.min(part * T.float32(0.5), T.float32(LIMIT)), T.float32(-LIMIT)), "float16"
            )
            for part in (ends[1] + ends[0], ends[1] - ends[0])
        )
        zero, scale = T.Bind(zero), T.Bind(scale)
        with T.If(self.lane == 0), T.Then():
            at = let(self.row * a.blocks * BLOCK + self.token)
            store(a.scale, at, scale)
            store(a.zero, at, zero)
        wide_scale, wide_zero = let(T.cast(scale, "float32")), let(T.cast(zero, "float32"))

        def write(channel: Expr) -> None:
            at, x = self._at(channel), let(self.x[channel])
            store(a.y, at, normalised(x, wide_scale, wide_zero))
            if case.count:
                outside = T.bool(True)
                if ranks:
                    outside = T.Or(
                        self.rank(call("ordered", -x), channel) > ranks[0],
                        self.rank(call("ordered", x), channel) > ranks[1],
                    )
                store(a.exact, at, T.cast(outside, "uint8"))

        self._each(write)

    def _largest(self, k: int, sign: int) -> Expr:
        def count(rank: Expr) -> Expr:
            total = registers(1, "int32")
            store(total, 0, T.int32(0))

            def add(channel: Expr) -> None:
                word = call("ordered", self.x[channel] if sign > 0 else -self.x[channel])
                above = self.rank(word, channel) >= rank
                store(total, 0, total[0] + T.cast(above, "int32"))

            self._each(add)
            return call("warp_total", total[0])

        return self.largest(k, count)

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


class Keys(Ranked):
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
        least = self.largest(BLOCK * case.count, self._count)

        def mark(place: Expr, at: Expr) -> None:
            error = let(a.errors[at])
            among = self.rank(call("as_word", error), place) >= least
            chosen = T.And(among, error > T.float32(0))
            store(a.exact, at, T.cast(chosen, "uint8"))

        self._each(mark)

    def _count(self, rank: Expr) -> Expr:
        total = registers(1, "int32")
        store(total, 0, T.int32(0))

        def add(place: Expr, at: Expr) -> None:
            above = self.rank(call("as_word", self.a.errors[at]), place) >= rank
            store(total, 0, total[0] + T.cast(above, "int32"))

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
        case = self.case
        with T.serial(0, BLOCK * case.channels // THREADS) as i:
            place = let(i * THREADS + self.thread)
            channel = let(place % case.channels)
            head = self.row * case.heads + channel // case.size
            token = self.block * BLOCK + place // case.channels
            row = wide_row(head) * wide(self.a.blocks * BLOCK) + wide(token)
            do(place, let(row * case.size + wide(channel % case.size)))
