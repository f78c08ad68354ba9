"""The CUDA kernel that codes a head's channels in turn, with error feedback.

A block of threads takes the 32 tokens of a block, a lane each, and holds what their channels aim
at in shared memory, in the order of ``feedback.turns``. The first warp codes a panel of channels;
then all warps add what its errors do to later ones, each in the order of the turns. Meanwhile the
other warps load the rows of the matrix that the next panel takes.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from regraft.kernels.attention.flash import Warp
from regraft.kernels.device import (
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
from regraft.kernels.kvquant.cuda.plan import BYTE_PITCH, PITCH, Turns
from regraft.kernels.kvquant.layout import BLOCK

WARPS = 8


def build(case: Turns) -> Any:
    """The kernel: y, matrix, midpoints, levels, exact, codes, aims, batch, heads and blocks.

    The tensors are those of ``Feedback.in_turn``, flat: y and aims float32 [B, H, 32 * blocks, D],
    matrix [H, D, D]; codes and exact, which is read where the case has it, uint8 like y.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("kvquant_turns")
        a = Arguments()
        with (
            T.launch_thread("blockIdx.x", a.blocks) as block,
            T.launch_thread("blockIdx.y", a.heads) as head,
            T.launch_thread("blockIdx.z", a.batch) as row,
            T.launch_thread("threadIdx.x", WARPS * 32) as thread,
        ):
            InTurn(case, a, block, head, row, thread).emit()
    return builder.get().with_attr("global_symbol", "kvquant_turns").with_attr("s_tir", False)


class Arguments:
    """The parameters in order; tensors are flat."""

    def __init__(self) -> None:
        self.y, self.matrix = vector("y", "float32"), vector("matrix", "float32")
        self.midpoints, self.levels = vector("midpoints", "float32"), vector("levels", "float32")
        self.exact = vector("exact", "uint8")
        self.codes, self.aims = vector("codes", "uint8"), vector("aims", "float32")
        self.batch, self.heads, self.blocks = (
            T.arg(name, T.int32()) for name in ("batch", "heads", "blocks")
        )


class InTurn:
    """The code of one thread."""

    def __init__(
        self, case: Turns, a: Arguments, block: Expr, head: Expr, row: Expr, thread: Expr
    ) -> None:
        self.case, self.a = case, a
        self.thread, self.head = thread, head
        self.warp = Warp(thread)
        self.base = let(wide_row((row * a.heads + head) * a.blocks + block) * (BLOCK * case.size))
        # what channels aim at; y, whose place errors take; rows of the matrix
        self.shared = T.alloc_buffer((case.floats,), "float32", scope="shared.dyn", align=16)
        self.given, self.rows = case.size * PITCH, 2 * case.size * PITCH
        # which are exact, whose place codes take
        self.codes = T.alloc_buffer((case.size * BYTE_PITCH,), "uint8", scope="shared")

    def emit(self) -> None:
        case = self.case
        self._load()
        with T.If(self.warp.index > 0), T.Then():
            self._load_rows(T.int32(0))
        T.evaluate(T.tvm_storage_sync("shared"))
        self.level = registers(1)
        store(self.level, 0, self.a.levels[self.warp.lane % case.levels])
        self.midpoints = registers(case.levels - 1)
        for i in range(case.levels - 1):
            store(self.midpoints, i, self.a.midpoints[i])
        counter = registers(1, "int32")
        store(counter, 0, T.int32(0))
        # no For: TVM would hoist conditions out of it
        with T.While(counter[0] < case.size):
            first = let(counter[0])
            store(counter, 0, first + case.panel)
            with T.If(self.warp.index == 0):
                with T.Then():
                    self._code(first)
                with T.Else():
                    with T.If(first + case.panel < case.size), T.Then():
                        self._load_rows(first + case.panel)
            T.evaluate(T.tvm_storage_sync("shared"))
            self._spread(first)
            T.evaluate(T.tvm_storage_sync("shared"))
        self._write()

    def _code(self, first: Expr) -> None:
        """Code a panel of channels from the turn ``first`` on; their errors replace y."""
        case, lane, shared = self.case, self.warp.lane, self.shared
        rows = let(self._rows(first) + first)
        place, byte = let(first * PITCH + lane), let(first * BYTE_PITCH + lane)
        aims, errors = registers(case.panel), registers(case.panel)
        codes = registers(case.panel, "int32")
        for i in range(case.panel):
            store(aims, i, shared[place + i * PITCH])
            store(errors, i, shared[self.given + place + i * PITCH])
        for i in range(case.panel):
            aim = let(aims[i])
            below = [T.cast(self.midpoints[k] < aim, "int32") for k in range(case.levels - 1)]
            store(codes, i, _sum(below))
            read = call("from_lane", self.level[0], codes[i])
            if case.exact:
                read = T.if_then_else(self.codes[byte + i * BYTE_PITCH] != T.uint8(0), aim, read)
            store(errors, i, errors[i] - read)
            for j in range(i + 1, case.panel):
                weight = shared[rows + i * case.size + j]
                store(aims, j, call("add_product", aims[j], errors[i], weight))
        for i in range(case.panel):
            store(shared, place + i * PITCH, aims[i])
            store(shared, self.given + place + i * PITCH, errors[i])
            store(self.codes, byte + i * BYTE_PITCH, T.cast(codes[i], "uint8"))

    def _spread(self, first: Expr) -> None:
        """Add what the errors of the panel do to the channels after it."""
        case, shared = self.case, self.shared
        width = min(case.panel, 4)
        errors, aims, row = registers(case.panel), registers(width), registers(width)
        for i in range(case.panel):
            store(errors, i, shared[self.given + (first + i) * PITCH + self.warp.lane])
        rows = let(self._rows(first))
        column = registers(1, "int32")
        store(column, 0, first + case.panel + self.warp.index * width)
        with T.While(column[0] < case.size):
            start = let(column[0])
            store(column, 0, start + WARPS * width)
            places = [let((start + j) * PITCH + self.warp.lane) for j in range(width)]
            for j in range(width):
                store(aims, j, shared[places[j]])
            for i in range(case.panel):
                at = rows + i * case.size + start
                call(f"copy{4 * width}", address(row, 0), address(shared, at))
                for j in range(width):
                    store(aims, j, call("add_product", aims[j], errors[i], row[j]))
            for j in range(width):
                store(shared, places[j], aims[j])

    # memory

    def _rows(self, first: Expr) -> Expr:
        """Where the rows of a panel lie: two panels' take turns."""
        return self.rows + first // self.case.panel % 2 * (self.case.panel * self.case.size)

    def _load_rows(self, first: Expr) -> None:
        """Load the rows of the matrix that belong to a panel, by all warps but the first."""
        count, threads = self.case.panel * self.case.size, WARPS * 32 - 32
        start = let(wide(self.head * self.case.size + first) * self.case.size)
        rows = let(self._rows(first))
        with T.serial(0, -(-count // threads)) as i:
            at = let(i * threads + self.thread - 32)
            with T.If(at < count), T.Then():
                store(self.shared, rows + at, self.a.matrix[start + wide(at)])

    def _load(self) -> None:
        a, shared = self.a, self.shared

        def load(place: Expr, byte: Expr, at: Expr) -> None:
            y = let(a.y[at])
            store(shared, place, y)
            store(shared, self.given + place, y)
            if self.case.exact:
                store(self.codes, byte, a.exact[at])

        self._each(load)

    def _write(self) -> None:
        def write(place: Expr, byte: Expr, at: Expr) -> None:
            store(self.a.aims, at, self.shared[place])
            store(self.a.codes, at, self.codes[byte])

        self._each(write)

    def _each(self, do: Any) -> None:
        """Do something with each number of the block, whose channels are a warp's lanes: with its
        places in shared memory, of floats and of bytes, and its own."""
        size = self.case.size
        with T.serial(0, BLOCK // WARPS) as i:
            token = let(i * WARPS + self.warp.index)
            with T.serial(0, -(-size // 32)) as j:
                channel = let(j * 32 + self.warp.lane)
                with T.If(channel < size), T.Then():
                    slow = T.if_then_else(channel < size // 2, size - 1, 2 * size - 2)
                    turn = let(slow - 2 * channel)
                    at = let(self.base + wide(token * size + channel))
                    do(turn * PITCH + token, turn * BYTE_PITCH + token, at)


def _sum(terms: list[Expr]) -> Expr:
    """In pairs, so that none waits for all before it."""
    while len(terms) > 1:
        terms = [let(sum(terms[i + 1 : i + 2], terms[i])) for i in range(0, len(terms), 2)]
    return terms[0]
