"""The CUDA kernel that packs codes and outliers: a block of threads takes the 32 tokens of a block,
a warp one head at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from regraft.kernels.attention.flash import Warp
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
from regraft.kernels.kvquant.cuda.ranging import LIMIT, key_scale, search
from regraft.kernels.kvquant.layout import BLOCK, PLANES

WARPS = 8


def build(case: Coded) -> Any:
    """The kernel: x, y, codes, aims, exact, scale, zero, midpoints, levels, order, packed, entries,
    offsets, then batch, blocks, rows and groups as for ``ranging``.

    order int32: ``layout.order`` of each plane. packed uint8 [B, H, blocks, bytes], entries and
    offsets as ``Packed`` has them; entries are zero before.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("kvquant_pack")
        a = Arguments()
        with (
            T.launch_thread("blockIdx.x", a.blocks) as block,
            T.launch_thread("blockIdx.y", a.batch) as row,
            T.launch_thread("threadIdx.x", WARPS * 32) as thread,
        ):
            Packing(case, a, block, row, thread).emit()
    return builder.get().with_attr("global_symbol", "kvquant_pack").with_attr("s_tir", False)


class Arguments:
    """The parameters in order; tensors are flat."""

    def __init__(self) -> None:
        self.x, self.y = vector("x", "float32"), vector("y", "float32")
        self.codes, self.aims = vector("codes", "uint8"), vector("aims", "float32")
        self.exact = vector("exact", "uint8")
        self.scale, self.zero = vector("scale", "float16"), vector("zero", "float16")
        self.midpoints, self.levels = vector("midpoints", "float32"), vector("levels", "float32")
        self.order = vector("order", "int32")
        self.packed = vector("packed", "uint8")
        self.entries, self.offsets = vector("entries", "int32"), vector("offsets", "int32")
        self.batch, self.blocks, self.rows, self.groups = (
            T.arg(name, T.int32()) for name in ("batch", "blocks", "rows", "groups")
        )


class Packing:
    """The code of one thread."""

    def __init__(self, case: Coded, a: Arguments, block: Expr, row: Expr, thread: Expr) -> None:
        self.case, self.a, self.block, self.row, self.thread = case, a, block, row, thread
        self.warp = Warp(thread)
        self.begins = T.alloc_buffer((case.heads + 1,), "int32", scope="shared")

    def emit(self) -> None:
        case = self.case
        self._each_head(self._pack)
        if not case.count:
            return
        self._each_head(self._count)
        T.evaluate(T.tvm_storage_sync("shared"))
        with T.If(self.thread == 0), T.Then():
            store(self.begins, 0, T.int32(0))
            with T.serial(0, case.heads) as head:
                store(self.begins, head + 1, self.begins[head] + self.begins[head + 1])
        T.evaluate(T.tvm_storage_sync("shared"))
        self._each_head(self._write)
        with T.If(self.thread == 0), T.Then():
            base = let((self.row * self.a.blocks + self.block) * (case.heads + 1))
            with T.serial(0, case.heads + 1) as head:
                store(self.a.offsets, base + head, self.begins[head])

    def _each_head(self, do: Callable[[Expr], None]) -> None:
        with T.serial(0, -(-self.case.heads // WARPS)) as i:
            head = let(i * WARPS + self.warp.index)
            with T.If(head < self.case.heads), T.Then():
                do(head)

    def _base(self, head: Expr) -> Expr:
        """Where the numbers of the block begin."""
        row = (self.row * self.case.heads + head) * self.a.blocks + self.block
        return let(wide_row(row) * (BLOCK * self.case.size))

    def _code(self, at: Expr) -> Expr:
        if self.case.feedback:
            return let(T.cast(self.a.codes[at], "int32"))
        return search(self.a.y[at], self.a.midpoints, 2**self.case.bits)

    def _pack(self, head: Expr) -> None:
        case, numbers = self.case, BLOCK * self.case.size
        base, low, begin = self._base(head), 0, 0
        for plane, width in enumerate(PLANES[case.bits]):
            each = 8 // width
            start = let(base // 8 * case.bits + begin)
            with T.serial(0, -(-numbers // each // 32)) as i:
                place = let(i * 32 + self.warp.lane)
                with T.If(place < numbers // each), T.Then():
                    byte = T.int32(0)
                    for k in range(each):
                        number = self.a.order[plane * numbers + place * each + k]
                        code = self._code(base + wide(number))
                        part = code >> T.int32(low) & T.int32(2**width - 1)
                        byte = let(byte | part << T.int32(width * k))
                    store(self.a.packed, start + wide(place), T.cast(byte, "uint8"))
            low += width
            begin += numbers // each

    # outliers

    def _count(self, head: Expr) -> None:
        total = registers(1, "int32")
        store(total, 0, T.int32(0))

        def add(entry: Expr, used: Expr) -> None:
            store(total, 0, total[0] + T.cast(used, "int32"))

        self._each_entry(head, add)
        every = call("warp_total", total[0])
        with T.If(self.warp.lane == 0), T.Then():
            store(self.begins, head + 1, every)

    def _write(self, head: Expr) -> None:
        case, a = self.case, self.a
        many = BLOCK * case.count
        base = let(wide_row(self.row * a.blocks + self.block) * many)
        next_ = registers(1, "int32")
        store(next_, 0, self.begins[head])

        def write(entry: Expr, used: Expr) -> None:
            all_ = call("ballot", T.cast(used, "int32"))
            mine = T.uint32(1) << T.cast(self.warp.lane, "uint32")
            with T.If(used), T.Then():
                before = call("ones", all_ & (mine - T.uint32(1)))
                store(a.entries, base + wide(next_[0] + before), entry)
            store(next_, 0, next_[0] + call("ones", all_))

        self._each_entry(head, write)

    def _each_entry(self, head: Expr, do: Callable[[Expr, Expr], None]) -> None:
        """Do something with each number, in the order of entries: the entry it makes, and whether
        it is one."""
        case, a = self.case, self.a
        base = self._base(head)
        with T.serial(0, case.size) as i:
            token, channel = self.warp.lane, i
            if case.kind == "key":
                place = let(i * 32 + self.warp.lane)
                token, channel = let(place // case.size), let(place % case.size)
            at = let(base + wide(token * case.size + channel))
            entry = registers(1, "int32")
            store(entry, 0, T.int32(0))
            with T.If(a.exact[at] != T.uint8(0)), T.Then():
                residual = self._residual(head, token, channel, at)
                half = call("pack_f16", residual, T.float32(0)) & T.uint32(0xFFFF)
                place = T.cast(token << T.int32(24) | channel << T.int32(16), "uint32")
                whole = T.cast(place | half, "int32")
                nothing = half & T.uint32(0x7FFF)
                store(entry, 0, T.if_then_else(nothing == T.uint32(0), T.int32(-1), whole))
            with T.If(a.exact[at] == T.uint8(0)), T.Then():
                store(entry, 0, T.int32(-1))
            do(entry[0], let(T.cast(entry[0] != T.int32(-1), "int32")) != 0)

    def _residual(self, head: Expr, token: Expr, channel: Expr, at: Expr) -> Expr:
        case, a = self.case, self.a
        if case.kind == "key":
            own = self.block * BLOCK + token
            of = key_scale(case, a, self.row, own, head * case.size + channel)
        else:
            of = let((self.row * a.blocks + self.block) * BLOCK + token)
        scale, zero = let(T.cast(a.scale[of], "float32")), let(T.cast(a.zero[of], "float32"))
        read = call("add_product", zero, a.levels[self._code(at)], scale)
        target = a.x[at]
        if case.feedback:
            target = call("add_product", target, a.aims[at] - a.y[at], scale)
        residual = target - read
        return let(T.max(T.min(residual, T.float32(LIMIT)), T.float32(-LIMIT)))
