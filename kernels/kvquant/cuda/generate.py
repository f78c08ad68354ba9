"""The attention kernel over packed keys and values for CUDA.

A block of threads takes a range of token blocks for up to 8 key/value heads, a warp each. Codes go
from memory to the registers whose operands they become; two codes at a time are looked up in
shared memory, where each lane has its own copy of the table. Keys are scaled and rotated in
registers as pairs of float16: queries are turned back to a block's last token, keys by the
rotations relative to it, which consecutive positions share from block to block.

Shared memory is what it waits for: a load gives 4 bytes a lane and cycle even where lanes read the
same, and on an H100 that path is busy 94 to 95 % of the time, with outliers or without. Half of the
loads are the look-ups, which tie 32 copies of the table to 32 banks.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

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
from regraft.kernels.kvquant.cuda.outliers import Outliers
from regraft.kernels.kvquant.cuda.plan import Case, Layout


def build(case: Case) -> Any:
    """The kernel; its arguments are those of ``Arguments`` in order."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("kvquant_attend")
        a = Arguments(case)
        layout = Layout(case)
        tiles = -(-case.rows // (8 * case.tiles))
        chunks = (a.exact + layout.blocks * BLOCK - 1) // (layout.blocks * BLOCK)
        with (
            T.launch_thread("blockIdx.x", a.splits + chunks) as split,
            T.launch_thread("blockIdx.y", tiles) as tile,
            T.launch_thread("blockIdx.z", a.batch * (case.heads // layout.heads)) as place,
            T.launch_thread("threadIdx.x", layout.warps * 32) as thread,
        ):
            Attend(case, layout, a, split, tile, place, thread).emit()
        merge(
            a.partial,
            a.sinks,
            a.out,
            case.dtype,
            case.rows,
            case.queries,
            case.value_size,
            case.heads,
            a.batch,
            (a.splits + chunks) * layout.blocks,
        )
    return builder.get().with_attr("global_symbol", "kvquant_attend").with_attr("s_tir", False)


class Arguments:
    """The parameters in order; tensors are flat."""

    def __init__(self, case: Case) -> None:
        self.q = vector("q", case.dtype)
        self.codes = {kind: vector(f"{kind}_codes", "uint8") for kind in ("key", "value")}
        self.levels = {kind: vector(f"{kind}_levels", "int8") for kind in ("key", "value")}
        self.key_scale, self.key_zero = vector("key_scale", "float16"), vector("zero", "float16")
        self.value_scale = vector("value_scale", "float16")
        self.value_zero = vector("value_zero", "float16")
        self.outliers, self.offsets = {}, {}
        for kind in ("key", "value"):
            self.outliers[kind] = vector(f"{kind}_outliers", "int32")
            self.offsets[kind] = vector(f"{kind}_offsets", "int32")
        self.table = vector("table", "float16")
        self.exact_key = vector("exact_key", case.dtype)
        self.exact_value = vector("exact_value", case.dtype)
        self.exact_mask = vector("exact_mask", "float32")
        self.first, self.sinks = vector("first", "int32"), vector("sinks", "float32")
        self.partial = tuple(vector(name, "float32") for name in ("outputs", "tops", "sums"))
        self.out = vector("out", case.dtype)
        for name in (
            *("batch", "splits", "blocks", "capacity", "table_capacity", "exact", "exact_capacity"),
            *("key_batch", "key_groups", "group", "table_batch"),
            *("key_places", "value_places"),
        ):
            setattr(self, name, T.arg(name, T.int32()))
        for name in ("key_unit", "value_unit", "scale", "softcap"):
            setattr(self, name, T.arg(name, T.float32()))


class Attend(Outliers):
    """The code of one thread."""

    def __init__(
        self, case: Case, layout: Layout, a: Any, split: Expr, tile: Expr, place: Expr, thread: Expr
    ) -> None:
        self.case, self.layout, self.a = case, layout, a
        self.split, self.thread = split, thread
        self.warp = Warp(thread)
        sharing = case.heads // layout.heads
        self.batch = let(place // sharing)
        self.head = let(place % sharing * layout.heads + self.warp.index % layout.heads)
        self.sub = let(self.warp.index // layout.heads)
        self.line = let(self.batch * case.heads + self.head)
        self.first_row = let(tile * (8 * case.tiles))
        self.shared = T.alloc_buffer((layout.bytes,), "uint8", scope="shared.dyn", align=128)
        self.own = let(layout.own + self.warp.index * layout.each)
        address_ = call("shared_address", address(self.shared, 0))
        angles = layout.blocks * layout.angles
        table = T.uint32(layout.table)
        self.table = let((address_ + T.uint32(angles) + table - T.uint32(1)) // table * table)
        self.table_place = let(T.cast(self.table - address_, "int32"))
        self.angles = let(self.sub * layout.angles)
        self.entry = let(self.table | T.cast(self.warp.lane * 4, "uint32"))
        self.flash = Flash(self.warp, case.value_size, case.tiles)
        self.seen = registers(2 * case.tiles, "int32")
        for tile_ in range(case.tiles):
            for e in range(2):
                row = (self.first_row + 8 * tile_ + 2 * self.warp.q + e) % case.queries
                store(self.seen, 2 * tile_ + e, a.first[self.batch * case.queries + row])

    def emit(self) -> None:
        with T.If(self.split < self.a.splits):
            with T.Then():
                self._body()
            with T.Else():
                self._exact()

    def _write(self, channel: Any) -> None:
        a, layout = self.a, self.layout
        chunks = (a.exact + layout.blocks * BLOCK - 1) // (layout.blocks * BLOCK)
        parts = (a.splits + chunks) * layout.blocks
        place = self.line * parts + self.split * layout.blocks + self.sub
        self.flash.write(a.partial, place, self.first_row, self.case.rows, channel)

    # exact tokens

    def _exact(self) -> None:
        a, case, flash = self.a, self.case, self.flash
        query = dense_query(
            *(a.q, wide(self.line) * (case.rows * case.size), self.first_row, case.rows),
            *(case.size, case.tiles, self.warp),
        )
        start = let(((self.split - a.splits) * self.layout.blocks + self.sub) * BLOCK)
        with T.If(start < a.exact), T.Then():
            last = let(a.exact - 1 - start)
            token = let(wide(self.line * a.exact_capacity + start))
            dense_scores(flash, case.dtype, a.exact_key, token * case.size, last, query, case.size)
            for tile in range(case.tiles):
                for e in range(2):
                    row = (self.first_row + 8 * tile + 2 * self.warp.q + e) % case.queries
                    line = let((self.batch * case.queries + row) * a.exact + start)
                    for i in range(4):
                        own = let(8 * i + self.warp.g)
                        at = tile * 8 + i * 2 + e
                        mask = a.exact_mask[line + T.min(own, last)]
                        mask = T.if_then_else(own <= last, mask, T.float32(float("-inf")))
                        score = self._capped(flash.scores[at] * a.scale)
                        store(flash.scores, at, (score + mask) * T.float32(LOG2E))
            flash.softmax(case.dtype)
            dense_values(
                flash, case.dtype, a.exact_value, token * case.value_size, last, case.value_size
            )
        self._write(dense_channel(self.warp, case.value_size))

    def _capped(self, score: Expr) -> Expr:
        if not self.case.softcap:
            return score
        return call("tanh", score / self.a.softcap) * self.a.softcap

    # packed tokens

    def _body(self) -> None:
        a, case, layout = self.a, self.case, self.layout
        self._load_levels()
        nearest, furthest = self._bounds()
        total = a.blocks
        begin = let(T.min(nearest // BLOCK, total))
        low = let(begin + (total - begin) * self.split // a.splits)
        high = let(begin + (total - begin) * (self.split + 1) // a.splits)
        turns = let((high - low + layout.blocks - 1) // layout.blocks)
        self.keys = registers(self._words("key"), "uint32")
        self.values = registers(self._words("value"), "uint32")
        self.entries = {kind: registers(2, "int32") for kind in ("key", "value")}
        self.range = {kind: registers(2, "int32") for kind in ("key", "value")}
        self.token = registers(2, "uint32")
        self.couples = -(-case.size // 128)  # of pairs of channels, a lane's
        self.rotations = registers(4 * self.couples, "uint32")
        self.place = registers(3, "int32")  # group of the scales, offsets of this and next block
        store(self.place, 0, T.int32(-1))
        with T.If(turns > 0), T.Then():
            block = let(T.min(low + self.sub, high - 1))
            self._load_offsets(block, 1)
            self._load_ahead(block)
        self._query()
        self._share_levels()
        T.evaluate(T.tvm_storage_sync("shared"))
        counter = registers(1, "int32")
        store(counter, 0, T.int32(0))
        # no For: TVM would hoist conditions out of it by copying its body, and refuse the copy
        with T.While(counter[0] < turns):
            turn = let(counter[0])
            store(counter, 0, turn + 1)
            block = let(T.min(low + turn * layout.blocks + self.sub, high - 1))
            self._turn(block, low, high, turn, furthest)
        if case.value_outliers:
            self._flush()
        self._write(lambda part, half: part * 16 + half * 8 + self.warp.g)

    def _turn(self, block: Expr, low: Expr, high: Expr, turn: Expr, furthest: Expr) -> None:
        case, layout, flash, warp = self.case, self.layout, self.flash, self.warp
        wanted = let(low + turn * layout.blocks + self.sub)
        self._load_codes("value", self.values, block)
        if case.rotated:
            self._rotate(block, turn)
        store(self.place, 1, self.place[2])
        self._load_entries("value", block)
        weigh, zero = self._value_scale()
        self._key_scale(block)
        if case.key_outliers:
            self._key_outliers(block)
            self._begin_scores()
        else:
            flash.clear()
        self._scores()
        following = let(T.min(wanted + layout.blocks, high - 1))
        self._load_offsets(following, 2)
        for tile in range(case.tiles):
            for i in range(4):
                for e in range(2):
                    self._finish_score(tile, i, e)
        with T.If(T.Or(block * BLOCK < furthest, wanted >= high)), T.Then():
            for tile in range(case.tiles):
                for i in range(4):
                    for e in range(2):
                        at = tile * 8 + i * 2 + e
                        own = block * BLOCK + 8 * i + warp.g
                        seen = T.And(own >= self.seen[2 * tile + e], wanted < high)
                        lowest = T.float32(float("-inf"))
                        store(flash.scores, at, T.if_then_else(seen, flash.scores[at], lowest))
        shift, scale, zeros = [], [], []
        for i in range(4):
            lane = let(8 * i + warp.g)
            scale.append(call("from_lane", weigh, lane))
            zeros.append(call("from_lane", zero, lane))
            shift.append(call("log2", T.max(scale[-1], T.float32(2.0**-24))))
        flash.softmax("float16", shift, scale, zeros, self._flush if case.value_outliers else None)
        self._load_ahead(following)
        for part in range(case.value_size // 16):
            for step in range(2):
                places = [(2 * part + c) * 4 + 2 * step + j for j in range(2) for c in range(2)]
                operand = [self._look_up("value", self.values, place) for place in places]
                flash.add_values("float16", part, step, operand)
        if case.value_outliers:
            self._value_outliers(block)

    def _bounds(self) -> tuple[Expr, Expr]:
        """The lowest and highest of the first tokens that the queries see."""
        first = [self.a.first[self.batch * self.case.queries + s] for s in range(self.case.queries)]
        nearest = furthest = first[0]
        for one in first[1:]:
            nearest, furthest = T.min(nearest, one), T.max(furthest, one)
        return let(T.max(nearest, 0)), let(furthest)

    def _load_ahead(self, block: Expr) -> None:
        """Load what the next turn needs first: key codes, outliers, the values' scales."""
        a, case = self.a, self.case
        self._load_codes("key", self.keys, block)
        if case.rotated:
            self._load_rotations(block)
        at = let(wide_row(self.batch * a.capacity + block) * BLOCK + wide(self.warp.lane))
        store(self.token, 0, call("load2", address(a.value_scale, at)))
        store(self.token, 1, call("load2", address(a.value_zero, at)))
        if case.key_outliers:
            self._load_entries("key", block)

    def _value_scale(self) -> tuple[Expr, Expr]:
        return call("float_f16", self.token[0]), call("float_f16", self.token[1])
