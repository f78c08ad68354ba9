"""The kernel for CUDA: one to sixteen rows of activations against each tile of weights.

A block of threads takes one or two tiles of channels, its warps share the columns. A warp holds the
next few blocks of weights in registers, so that memory is always asked for more; tensor cores
multiply them, channels by rows. Groups are scaled after their products are summed.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from regraft.kernels.device import (
    BITS,
    Expr,
    address,
    call,
    let,
    registers,
    store,
    vector,
    wide,
    wide_row,
)
from regraft.kernels.linear.cuda import Case
from regraft.kernels.linear.cuda.weights import Place, weights
from regraft.kernels.linear.formats import HALVES

ONES = {"float16": 0x3C003C00, "bfloat16": 0x3F803F80}


def build(case: Case) -> Any:
    """The kernel: x, packed, bias where the case has it, out, then the sizes of ``Arguments``."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("cuda_linear")
        a = Arguments(case)
        with (
            T.launch_thread(
                "blockIdx.x", (a.channels + case.channels - 1) // case.channels
            ) as strip,
            T.launch_thread("blockIdx.y", (a.count + case.rows - 1) // case.rows) as piece,
            T.launch_thread("threadIdx.x", case.plan.warps * 32) as thread,
            T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", case.plan.resident),
        ):
            Product(case, a, strip, piece, thread).emit()
    return builder.get().with_attr("global_symbol", "cuda_linear").with_attr("s_tir", False)


class Arguments:
    """The parameters in order; tensors are flat."""

    def __init__(self, case: Case) -> None:
        self.x = vector("x", case.dtype)
        self.packed = vector("packed", case.format if case.format in HALVES else "uint8")
        self.bias = vector("bias", case.dtype) if case.bias else None
        self.out = vector("out", case.result)
        for name in ("count", "columns", "channels", "size"):
            setattr(self, name, T.arg(name, T.int32()))


class Product:
    """The code of one thread."""

    def __init__(self, case: Case, a: Any, strip: Expr, piece: Expr, thread: Expr) -> None:
        self.case, self.a, self.thread = case, a, thread
        self.warp, lane = let(thread // 32), let(thread % 32)
        self.g, self.q = let(lane // 4), let(lane % 4)
        self.first_row, self.first_channel = let(piece * case.rows), let(strip * case.channels)
        place = Place(self.g, self.q, let(strip * case.plan.tiles), a.channels, a.size)
        self.weights = weights(case.format, case.dtype, a.packed, a.columns, place, case.plan.tiles)
        rows = [self.first_row + 8 * tile + self.g for tile in range(case.rows // 8)]
        self.starts = [let(wide_row(T.min(row, a.count - 1)) * wide(a.columns)) for row in rows]
        self.ring = registers(case.plan.depth * self.weights.words, "uint32")
        self.sums = registers(2 * self.weights.channels * len(rows))
        for i in range(int(self.sums.shape[0])):
            store(self.sums, i, T.float32(0))

    def emit(self) -> None:
        case, depth = self.case, self.case.plan.depth
        blocks = let(self.a.columns // self.weights.block)
        units = let((blocks + depth - 1) // depth)
        block = registers(1, "int32")
        begin = let(units * self.warp // case.plan.warps * depth)
        end = let(T.min(units * (self.warp + 1) // case.plan.warps * depth, blocks))
        if case.overlapping:
            call("begin_next")
            for i in range(case.plan.ahead):
                self._prefetch(begin + i * depth, end)
            call("end_previous")
        store(block, 0, begin)
        unit = self.weights.unit(begin)
        for slot in range(depth):
            self._load(unit, slot, begin, end)
        # no For: TVM would hoist conditions out of it
        with T.While(block[0] + depth <= end):
            start = let(block[0])
            following = let(start + depth)
            store(block, 0, following)
            unit, given = self.weights.unit(following), self._given(start)
            for slot in range(depth):
                self._multiply(slot, given)
                self._load(unit, slot, following, end)
            if case.plan.ahead > 1:
                self._prefetch(start + case.plan.ahead * depth, end)
        rest = let(block[0])
        given = self._given(rest)
        for slot in range(depth - 1):
            with T.If(rest + slot < end), T.Then():
                self._multiply(slot, given)
        self._write()

    def _prefetch(self, block: Expr, end: Expr) -> None:
        own, depth = let(block), self.case.plan.depth
        self.weights.prefetch(own, depth, own + depth <= end)

    def _load(self, unit: list[Expr], slot: int, start: Expr, end: Expr) -> None:
        valid = let(T.cast(start + slot < end, "int32"))
        self.weights.load(self.ring, slot * self.weights.words, unit, slot, valid)

    def _given(self, block: Expr) -> list[Expr]:
        """Where the activations of this block lie, by tile of rows."""
        return [let(start + wide(block * self.weights.block)) for start in self.starts]

    def _multiply(self, slot: int, starts: list[Expr]) -> None:
        """Add the products of a block's columns."""
        w, at = self.weights, slot * self.weights.words
        mma = f"mma_{BITS[self.case.dtype]}"
        given = []
        for start in starts:
            words = registers(4, "uint32")
            w.load_activations(words, self.a.x, start + slot * w.block)
            given.append(w.activations(words))
        size = 2 * w.channels
        sums = registers(size * len(given)) if w.scaled else self.sums
        totals = registers(4 * len(given))
        if w.scaled:
            for i in range(int(sums.shape[0])):
                store(sums, i, T.float32(0))
            for i in range(int(totals.shape[0])):
                store(totals, i, T.float32(0))
        ones = T.uint32(ONES[self.case.dtype])
        for tile, (_, added) in enumerate(given):
            for pair in added:
                call(mma, address(totals, 4 * tile), *[ones] * 4, *pair)
        for step, operands in enumerate(w.steps(self.ring, at)):
            for tile, (pairs, _) in enumerate(given):
                for i, four in enumerate(operands):
                    call(mma, address(sums, tile * size + 4 * i), *four, *pairs[step])
        if w.scaled:
            self._scale(at, sums, totals)

    def _scale(self, at: int, sums: Any, totals: Any) -> None:
        """Add what a group's sums of codes times activations stand for."""
        w = self.weights
        scale, *zero = w.scales(self.ring, at)
        for i in range(int(self.sums.shape[0])):
            tile, own = divmod(i, 2 * w.channels)
            channel, total = own // 2, totals[4 * tile + own % 2]
            centred = let(sums[i] - T.float32(w.offset) * total)
            value = let(self.sums[i] + scale[channel] * centred)
            store(self.sums, i, value + zero[0][channel] * total if zero else value)

    def _write(self) -> None:
        """Add up the warps' sums and write those of rows and channels that there are."""
        case, a, w = self.case, self.a, self.weights
        size = case.rows * case.channels
        shared = T.alloc_buffer((case.plan.warps * size,), "float32", scope="shared")
        left = let(a.count - self.first_row)
        for i in range(int(self.sums.shape[0])):
            tile, own = divmod(i, 2 * w.channels)
            row = let(8 * tile + 2 * self.q + own % 2)
            with T.If(row < left), T.Then():
                at = (self.warp * case.rows + row) * case.channels + w.channel(own // 2, self.g)
                store(shared, at, self.sums[i])
        T.evaluate(T.tvm_storage_sync("shared"))
        for start in range(0, size, case.plan.warps * 32):
            index = let(self.thread + start)
            row = let(index // case.channels)
            channel = let(self.first_channel + index % case.channels)
            with T.If(T.And(row < T.min(left, case.rows), channel < a.channels)), T.Then():
                total = registers(1)
                store(total, 0, T.float32(0))
                for warp in range(case.plan.warps):
                    store(total, 0, total[0] + shared[warp * size + index])
                if a.bias is not None:
                    store(total, 0, total[0] + T.cast(a.bias[channel], "float32"))
                place = wide_row(self.first_row + row) * wide(a.channels) + wide(channel)
                store(a.out, place, T.cast(total[0], case.result))
