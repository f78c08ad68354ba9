"""The attention kernel over packed keys and values for CUDA.

A block of threads takes a range of token blocks for up to 8 key/value heads, a warp each, so that
the rotations are read once for all of them. Codes go from memory to the registers whose operands
they become; two codes at a time are looked up in shared memory, where each lane has its own copy
of the table. Keys are scaled and rotated in registers as pairs of float16.
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
from regraft.kernels.kvquant.cuda.plan import STAGES, TILE_ROW, Case, Layout
from regraft.kernels.kvquant.layout import PLANES, load_bytes
from regraft.kernels.device import (
    BITS,
    Expr,
    address,
    call,
    let,
    load_words,
    registers,
    store,
    vector,
    warp_max,
    wide,
)

FRACTION = 2.0**12
"""Outliers' parts of the scores are added up as integers with this many fractions."""


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


class Attend:
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
        stages = layout.blocks * STAGES * layout.stage
        table = T.uint32(layout.table)
        self.table = let((address_ + T.uint32(stages) + table - T.uint32(1)) // table * table)
        self.table_place = let(T.cast(self.table - address_, "int32"))
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
            dense_scores(
                flash, case.dtype, a.exact_key, token * case.size, last, query, case.size
            )
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
        a, case, layout, flash = self.a, self.case, self.layout, self.flash
        self._levels()
        self._query()
        nearest, furthest = self._bounds()
        total = a.blocks
        begin = let(T.min(nearest // BLOCK, total))
        low = let(begin + (total - begin) * self.split // a.splits)
        high = let(begin + (total - begin) * (self.split + 1) // a.splits)
        turns = let((high - low + layout.blocks - 1) // layout.blocks)
        self._prepare_stages(low)
        T.evaluate(T.tvm_storage_sync("shared"))
        self.keys = registers(self._words("key"), "uint32")
        self.values = registers(self._words("value"), "uint32")
        self.entries = {kind: registers(2, "int32") for kind in ("key", "value")}
        self.range = {kind: registers(2, "int32") for kind in ("key", "value")}
        self.token = registers(2, "uint32")
        self.fraction = registers(2)
        store(self.fraction, 0, T.float32(2.0**100))
        store(self.fraction, 1, T.float32(2.0**-100))
        self.place = registers(3, "int32")  # group of the scales, offsets of this and next block
        store(self.place, 0, T.int32(-1))
        with T.If(turns > 0), T.Then():
            block = let(T.min(low + self.sub, high - 1))
            for turn in range(2):
                self._stage(low, high, T.int32(turn) if isinstance(turn, int) else turn)
            self._load_offsets(block, 1)
            self._load_ahead(block)
        counter = registers(1, "int32")
        store(counter, 0, T.int32(0))
        # no For: TVM would hoist conditions out of it by copying its body, and refuse the copy
        with T.While(counter[0] < turns):
            turn = let(counter[0])
            store(counter, 0, turn + 1)
            block = let(T.min(low + turn * layout.blocks + self.sub, high - 1))
            call("async_wait")
            call("sync_threads", self.sub + 1, T.int32(layout.heads * 32))
            self._stage(low, high, turn + 2)
            self._turn(block, low, high, turn, furthest)
        if case.value_outliers:
            self._flush()
        self._write(lambda part, half: part * 16 + half * 8 + self.warp.g)

    def _turn(self, block: Expr, low: Expr, high: Expr, turn: Expr, furthest: Expr) -> None:
        a, case, layout, flash, warp = self.a, self.case, self.layout, self.flash, self.warp
        wanted = let(low + turn * layout.blocks + self.sub)
        stage = let(self.slot[0])
        if case.rotated:
            self._next_slot(0)
        self._load_codes("value", self.values, block)
        store(self.place, 1, self.place[2])
        self._load_entries("value", block)
        weigh, zero = self._value_scale()
        self._key_scale(block)
        if case.key_outliers:
            self._key_outliers(stage, block)
        flash.clear()
        self._scores(stage)
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
        flash.softmax(
            "float16", shift, scale, zeros, self._flush if case.value_outliers else None
        )
        self._load_ahead(following)
        for part in range(case.value_size // 16):
            for step in range(2):
                places = [(2 * part + c) * 4 + 2 * step + j for j in range(2) for c in range(2)]
                operand = [self._look_up("value", self.values, place) for place in places]
                flash.add_values("float16", part, step, operand)
        if case.value_outliers:
            self._value_outliers(block, turn)

    def _levels(self) -> None:
        """Fill the look-up table: an entry is 64 words, 32 copies for keys, 32 for values."""
        case, threads = self.case, self.layout.warps * 32
        for kind, bits, side in (
            ("key", case.key_bits, 0),
            ("value", case.value_bits, 1),
        ):
            unit = self.a.key_unit if kind == "key" else self.a.value_unit
            levels, count = self.a.levels[kind], 4**bits * 8
            with T.serial(0, (count + threads - 1) // threads) as i:
                at = let(i * threads + self.thread)
                with T.If(at < count), T.Then():
                    entry = let(at // 8)
                    low, high = self._pair_codes(entry, bits)
                    pair = call(
                        "pack_f16",
                        T.cast(levels[low], "float32") * unit,
                        T.cast(levels[high], "float32") * unit,
                    )
                    place = self.table_place + entry * 256 + side * 128 + at % 8 * 16
                    call("write16", address(self.shared, place), pair, pair, pair, pair)

    def _pair_codes(self, entry: Expr, bits: int) -> tuple[Expr, Expr]:
        if bits == 3:
            low = let(entry % 4 + entry // 16 % 2 * 4)
            return low, let(entry // 4 % 4 + entry // 32 * 4)
        return let(entry % 2**bits), let(entry // 2**bits)

    def _look_up(self, kind: str, words: Any, pair: int) -> Expr:
        """The two levels of a pair of codes, as float16."""
        bits = self.case.key_bits if kind == "key" else self.case.value_bits
        if bits == 4:
            at = call("permute", words[pair // 4], self.entry, T.uint32(0x7604 | pair % 4 << 4))
        else:
            at = _shift(words[pair // 8], 8 - pair % 8 * 4) & T.uint32(0xF00) | self.entry
            if bits == 3:
                word = words[-(-self._size(kind) * 2 // 32) + pair // 16]
                at = at | _shift(word, 12 - pair % 16 * 2) & T.uint32(0x3000)
        return call("look_up" if kind == "key" else "look_up_second", at)

    def _size(self, kind: str) -> int:
        return self.case.size if kind == "key" else self.case.value_size

    def _words(self, kind: str) -> int:
        bits = self.case.key_bits if kind == "key" else self.case.value_bits
        return sum(-(-self._size(kind) * width // 32) for width in PLANES[bits])

    def _load_codes(self, kind: str, words: Any, block: Expr) -> None:
        bits, size = getattr(self.case, f"{kind}_bits"), self._size(kind)
        base = let(wide(self.line * self.a.capacity + block) * (BLOCK * size * bits // 8))
        start = place = 0
        for width in PLANES[bits]:
            each = size * width // 8
            step = load_bytes(size, width)
            for chunk in range(each // step):
                at = base + wide(start + chunk * 32 * step + self.warp.lane * step)
                load_words(words, place * 4 + chunk * step, self.a.codes[kind], at, step)
            start += 32 * each
            place += -(-each // 4)

    def _query(self) -> None:
        """Queries as float16 operands, each row divided by its largest element."""
        case, warp, a = self.case, self.warp, self.a
        steps = case.size // 16
        self.query = registers(case.tiles * steps * 2, "uint32")
        self.row_scale = registers(case.tiles * 2)
        raw = registers(steps * 2, "uint32")
        for tile in range(case.tiles):
            row = let(self.first_row + 8 * tile + warp.g)
            base = let(wide(self.line * case.rows + row) * case.size)
            largest = registers(1)
            store(largest, 0, T.float32(1e-30))
            for at in range(steps * 2):
                channel = at // 2 * 8 + at % 2 * (case.size // 2) + 2 * warp.q
                store(raw, at, T.uint32(0))
                with T.If(row < case.rows), T.Then():
                    store(raw, at, call("read4", address(a.q, base + wide(channel))))
                for e in range(2):
                    store(largest, 0, T.max(largest[0], T.abs(self._element(raw[at], e))))
            norm = let(warp_max(largest[0], (1, 2)))
            for at in range(steps * 2):
                pair = [self._element(raw[at], e) / norm for e in range(2)]
                store(self.query, tile * steps * 2 + at, call("pack_f16", *pair))
            for e in range(2):
                lane = let((2 * warp.q + e) * 4)
                store(self.row_scale, tile * 2 + e, call("from_lane", norm, lane) * (a.scale * T.float32(1.0 if case.softcap else LOG2E)))
            self._share_fragments(tile, steps)
            if case.key_outliers:
                self._share_query(tile, steps)
        for at in range(case.row_stride * case.value_size // 32 if case.value_outliers else 0):
            place = self.own + self.layout.extra + at * 128 + warp.lane * 4
            call("write4", address(self.shared, place), T.uint32(0))

    def _element(self, word: Expr, e: int) -> Expr:
        return call(f"float_{BITS[self.case.dtype]}", word >> T.uint32(16) if e else word)

    def _share_fragments(self, tile: int, steps: int) -> None:
        """Keep the operands out of the registers, [tile, step, row, q], two words each."""
        rows = min(8, self.case.row_stride)
        with T.If(self.warp.g < rows), T.Then():
            for step in range(steps):
                pair = [self.query[(tile * steps + step) * 2 + i] for i in range(2)]
                place = self.own + self.layout.fragment + (tile * steps + step) * rows * 32
                place = place + self.warp.g * 32 + self.warp.q * 8
                call("write8", address(self.shared, place), *pair)

    def _share_query(self, tile: int, steps: int) -> None:
        """Lay out queries for outliers: of a pair of channels both elements, row by row."""
        case, warp = self.case, self.warp
        own = let(8 * tile + warp.g)
        with T.If(own < case.row_stride), T.Then():
            for step in range(steps):
                first, second = (self.query[(tile * steps + step) * 2 + i] for i in range(2))
                for e in range(2):
                    pair = step * 8 + 2 * warp.q + e
                    place = self.own + self.layout.query + (pair * case.row_stride + own) * 4
                    both = call("permute", first, second, T.uint32(0x7632 if e else 0x5410))
                    call("write4", address(self.shared, place), both)

    def _bounds(self) -> tuple[Expr, Expr]:
        """The lowest and highest of the first tokens that the queries see."""
        first = [self.a.first[self.batch * self.case.queries + s] for s in range(self.case.queries)]
        nearest = furthest = first[0]
        for one in first[1:]:
            nearest, furthest = T.min(nearest, one), T.max(furthest, one)
        return let(T.max(nearest, 0)), let(furthest)

    def _prepare_stages(self, low: Expr) -> None:
        """Where this thread's pieces of a block's rotations come from and go to."""
        a, case, layout = self.a, self.case, self.layout
        self.pieces: list[tuple[Expr, Expr, Expr]] = []
        self.slot = registers(2, "int32")  # of the turn, and of the one to be copied
        first = let(self.sub * (STAGES * layout.stage))
        store(self.slot, 0, first)
        store(self.slot, 1, first)
        if not case.rotated:
            return
        own = let(self.thread - self.sub * (layout.heads * 32))
        origin = let(wide(self.batch * a.table_batch * a.table_capacity + low + self.sub))
        row, count, threads = case.size // 8, 4 * case.size, layout.heads * 32
        for i in range(-(-count // threads)):
            piece = let(own + i * threads)
            source = let(origin * (BLOCK * case.size) + wide(piece * 8))
            place = let(piece // row * layout.row + piece % row * 16)
            self.pieces.append((piece < count, source, place))

    def _next_slot(self, i: int) -> None:
        last = self.sub * (STAGES * self.layout.stage) + (STAGES - 1) * self.layout.stage
        after = self.slot[i] + self.layout.stage
        store(self.slot, i, T.if_then_else(self.slot[i] < last, after, self.slot[i] - (STAGES - 1) * self.layout.stage))

    def _stage(self, low: Expr, high: Expr, turn: Expr) -> None:
        """Copy the rotations of a turn's block to shared memory."""
        if self.pieces:
            behind = let(turn * self.layout.blocks)
            inside = low + behind + self.sub < high
            skipped = let(wide(behind) * (BLOCK * self.case.size))
            for wanted, source, place in self.pieces:
                with T.If(T.And(wanted, inside)), T.Then():
                    target = address(self.shared, self.slot[1] + place)
                    call("async16", target, address(self.a.table, source + skipped))
            self._next_slot(1)
        call("async_commit")

    def _load_offsets(self, block: Expr, slot: int) -> None:
        """Lanes 0..3 of a slot: begin and end of a block's outliers, of keys and of values."""
        case, a, warp = self.case, self.a, self.warp
        slot = 2 if slot == 1 else slot
        at = let((self.batch * a.capacity + block) * (case.heads + 1) + self.head + warp.lane % 2)
        for kind, lanes in (("key", 0), ("value", 1)):
            if getattr(case, f"{kind}_outliers"):
                with T.If(warp.lane // 2 == lanes), T.Then():
                    store(self.place, 2, a.offsets[kind][at])

    def _load_ahead(self, block: Expr) -> None:
        """Load what the next turn needs first: key codes, outliers, the values' scales."""
        a, case = self.a, self.case
        self._load_codes("key", self.keys, block)
        if case.key_outliers:
            self._load_entries("key", block)
        at = let(wide((self.batch * a.capacity + block) * BLOCK + self.warp.lane))
        store(self.token, 0, call("load2", address(a.value_scale, at)))
        store(self.token, 1, call("load2", address(a.value_zero, at)))

    def _slice(self, kind: str, slot: int) -> tuple[Expr, Expr]:
        lane = 0 if kind == "key" else 2
        return (
            call("int_from_lane", self.place[slot], lane),
            call("int_from_lane", self.place[slot], lane + 1),
        )

    def _entry_base(self, kind: str, block: Expr) -> Expr:
        places = self.a.key_places if kind == "key" else self.a.value_places
        return wide(self.batch * self.a.capacity + block) * wide(places)

    def _load_entries(self, kind: str, block: Expr) -> None:
        if not getattr(self.case, f"{kind}_outliers"):
            return
        low, high = self._slice(kind, 2 if kind == "key" else 1)
        store(self.range[kind], 0, low)
        store(self.range[kind], 1, high)
        base = let(self._entry_base(kind, block))
        for turn in range(2):
            at = let(low + turn * 32 + self.warp.lane)
            store(self.entries[kind], turn, self.warp.lane << 24 | self.warp.lane << 16)
            with T.If(at < high), T.Then():
                word = call("load4", address(self.a.outliers[kind], base + wide(at)))
                store(self.entries[kind], turn, T.reinterpret("int32", word))

    def _value_scale(self) -> tuple[Expr, Expr]:
        return call("float_f16", self.token[0]), call("float_f16", self.token[1])

    def _key_scale(self, block: Expr) -> None:
        """Keep scale and zero of the block's group in shared memory, four pairs of them a lane."""
        a, case, warp = self.a, self.case, self.warp
        group = let(T.if_then_else(a.group > 0, block // T.max(a.group, 1), 0))
        with T.If(group != self.place[0]), T.Then():
            store(self.place, 0, group)
            line = self.batch * a.key_batch * case.heads + self.head
            base = let(wide(line * a.key_groups + group) * case.size)
            call("sync_warp")
            for i in range(-(-case.size // 128)):
                couple = let(i * 32 + warp.lane)
                with T.If(couple < case.size // 4), T.Then():
                    words = [
                        call("read4", address(x, base + wide(2 * couple + half)))
                        for x in (a.key_scale, a.key_zero)
                        for half in (0, case.size // 2)
                    ]
                    call("write16", address(self.shared, self.own + couple * 16), *words)
            call("sync_warp")

    def _scores(self, stage: Expr) -> None:
        """Products of the block's keys, two pairs of channels of four tokens at a time."""
        case, warp, layout = self.case, self.warp, self.layout
        scale = registers(4, "uint32")
        turn = registers(2, "uint32")
        row = let(stage + warp.g * layout.row + warp.q * 8)
        rows = min(8, case.row_stride)
        fragment = let(self.own + layout.fragment + warp.g % rows * 32 + warp.q * 8)
        query = registers(2 * case.tiles, "uint32")
        for step in range(case.size // 16):
            place = self.own + (step * 4 + warp.q) * 16
            call("copy16", address(scale, 0), address(self.shared, place))
            for tile in range(case.tiles):
                place = fragment + (tile * (case.size // 16) + step) * rows * 32
                call("copy8", address(query, 2 * tile), address(self.shared, place))
            operand: list[list[Expr]] = [[], []]
            for i in range(4):
                pair = (step * 4 + i) * 2
                first, second = (
                    call("fma2", self._look_up("key", self.keys, pair + h), scale[h], scale[2 + h])
                    for h in range(2)
                )
                if case.rotated:
                    at = row + (8 * i * layout.row + step * 32)
                    call("copy8", address(turn, 0), address(self.shared, at))
                    cos, sin = let(turn[0]), let(turn[1])
                    first, second = (
                        call("fnma2", second, sin, call("mul2", first, cos)),
                        call("fma2", first, sin, call("mul2", second, cos)),
                    )
                operand[0].append(first)
                operand[1].append(second)
            for half in range(2):
                words = [operand[h][2 * half + i] for h in range(2) for i in range(2)]
                self.flash.add_scores("float16", half, words, query, 0)

    def _finish_score(self, tile: int, i: int, e: int) -> None:
        """Add the outliers' part, scale, cap; to units of log 2."""
        case, warp, flash = self.case, self.warp, self.flash
        at = tile * 8 + i * 2 + e
        score = flash.scores[at]
        if case.key_outliers:
            row = (8 * tile + 2 * warp.q) % case.row_stride + e
            place = self.own + self.layout.tile + (row * TILE_ROW + 8 * i + warp.g) * 4
            word = T.reinterpret("int32", call("read4", address(self.shared, place)))
            score = score + T.cast(word, "float32") * T.float32(1 / FRACTION)
        score = score * self.row_scale[tile * 2 + e]
        if case.softcap:
            score = self._capped(score) * T.float32(LOG2E)
        store(flash.scores, at, score)

    # outliers

    def _each_entry(self, kind: str, block: Expr, use: Any) -> None:
        """Call use(entry) for each outlier of the block and head; lanes without one use a zero."""
        for turn in range(2):
            use(self.entries[kind][turn])
        low, high = let(self.range[kind][0]), let(self.range[kind][1])
        with T.If(high - low > 64), T.Then():
            base = let(self._entry_base(kind, block))
            with T.serial(2, (high - low + 31) // 32) as turn:
                at = let(low + turn * 32 + self.warp.lane)
                with T.If(at < high), T.Then():
                    word = call("load4", address(self.a.outliers[kind], base + wide(at)))
                    use(let(T.reinterpret("int32", word)))

    def _key_outliers(self, stage: Expr, block: Expr) -> None:
        """Add the outliers' products with the queries into the warp's tile [token, row]."""
        case, warp, layout = self.case, self.warp, self.layout
        tile = let(self.own + layout.tile)
        for i in range(case.row_stride):
            place = tile + (i * TILE_ROW + warp.lane) * 4
            call("write4", address(self.shared, place), T.uint32(0))
        call("sync_warp")
        half = case.size // 2
        words = registers(4, "uint32")

        def use(entry: Expr) -> None:
            token, channel = let(entry >> 24), let(entry >> 16 & 255)
            value = _residual(entry)
            second = let(channel >= half)
            pair = let(T.if_then_else(second, channel - half, channel))
            zero = T.float32(0)
            if case.rotated:
                at = let(stage + token * layout.row + pair // 2 * 8)
                call("copy8", address(words, 0), address(self.shared, at))
                odd = let(T.cast(pair % 2 * 16, "uint32"))
                cos, sin = (call("float_f16", words[i] >> odd) for i in range(2))
                x = let(T.if_then_else(second, -sin, cos) * value * T.float32(FRACTION))
                y = let(T.if_then_else(second, cos, sin) * value * T.float32(FRACTION))
            else:
                x = let(T.if_then_else(second, zero, value) * T.float32(FRACTION))
                y = let(T.if_then_else(second, value, zero) * T.float32(FRACTION))
            for start in range(0, case.row_stride, 4):
                place = self.own + layout.query + (pair * case.row_stride + start) * 4
                call("copy16", address(words, 0), address(self.shared, place))
                for row in range(4):
                    a = call("float_f16", words[row])
                    b = call("float_f16", words[row] >> T.uint32(16))
                    place = tile + ((start + row) * TILE_ROW + token) * 4
                    part = call("round", a * x + b * y)
                    call("atomic_add", address(self.shared, place), part)

        self._each_entry("key", block, use)
        call("sync_warp")

    def _value_outliers(self, block: Expr, turn: Expr) -> None:
        """Add the outliers times the weights into the warp's [row, channel], as integers."""
        case, warp, layout, flash = self.case, self.warp, self.layout, self.flash
        tile = let(self.own + layout.tile)
        call("sync_warp")
        for part in range(case.tiles):
            with T.If(8 * part + 2 * warp.q < case.row_stride), T.Then():
                for i in range(4):
                    place = (8 * i + warp.g) * case.row_stride + 8 * part + 2 * warp.q
                    pair = [call("as_word", flash.scores[part * 8 + i * 2 + e]) for e in range(2)]
                    call("write8", address(self.shared, tile + place * 4), *pair)
        self._choose_fraction(block, turn)
        call("sync_warp")
        words = registers(4, "uint32")

        def use(entry: Expr) -> None:
            token, channel = let(entry >> 24), let(entry >> 16 & 255)
            value = let(_residual(entry) * self.fraction[0])
            for start in range(0, case.row_stride, 4):
                place = tile + (token * case.row_stride + start) * 4
                call("copy16", address(words, 0), address(self.shared, place))
                for row in range(min(4, case.rows - start)):
                    place = (start + row) * case.value_size + channel
                    place = self.own + layout.extra + place * 4
                    part = call("round", call("as_float", words[row]) * value)
                    call("atomic_add", address(self.shared, place), part)

        self._each_entry("value", block, use)

    def _choose_fraction(self, block: Expr, turn: Expr) -> None:
        """Flush before integers can overflow: at most 32 are added to one of them in a turn."""
        largest = registers(2)
        store(largest, 0, self.flash.scores[0])
        for i in range(1, self.case.tiles * 8):
            store(largest, 0, T.max(largest[0], self.flash.scores[i]))
        store(largest, 1, T.float32(0))

        def use(entry: Expr) -> None:
            store(largest, 1, T.max(largest[1], T.abs(_residual(entry))))

        self._each_entry("value", block, use)
        bound = [
            call("as_float", call("warp_max_word", call("as_word", largest[i]))) for i in range(2)
        ]
        bound_ = let(bound[0] * bound[1])
        full = T.Or(bound_ * self.fraction[0] > T.float32(2.0**22), turn % 8 == 7)
        with T.If(full), T.Then():
            self._flush()
            least = T.max(bound_, T.float32(2.0**-100))
            store(self.fraction, 0, T.min(self.fraction[0], T.float32(2.0**21) / least))
            store(self.fraction, 1, T.float32(1) / self.fraction[0])

    def _flush(self) -> None:
        """Add the integers [row, channel] to the outputs and clear them."""
        case, warp, flash = self.case, self.warp, self.flash
        call("sync_warp")
        for tile in range(case.tiles):
            with T.If(8 * tile + 2 * warp.q < case.row_stride), T.Then():
                for part in range(case.value_size // 16):
                    for half in range(2):
                        for e in range(2):
                            row = 8 * tile + 2 * warp.q + e
                            place = row * case.value_size + part * 16 + half * 8 + warp.g
                            place = self.own + self.layout.extra + place * 4
                            where = address(self.shared, place)
                            sum_ = T.reinterpret("int32", call("read4", where))
                            at = (tile * flash.parts + part) * 4 + half * 2 + e
                            sum_ = T.cast(sum_, "float32") * self.fraction[1]
                            store(flash.out, at, flash.out[at] + sum_)
                            call("write4", where, T.uint32(0))
        call("sync_warp")


def _residual(entry: Expr) -> Expr:
    return call("float_f16", T.cast(entry & 0xFFFF, "uint32"))


def _shift(word: Expr, left: int) -> Expr:
    return word << T.uint32(left) if left >= 0 else word >> T.uint32(-left)
