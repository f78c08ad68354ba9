"""What the attention kernels for CUDA share: online softmax in registers, dense tiles, the merge.

One warp attends with up to 16 rows (queries of one key/value head) to blocks of 32 tokens. Scores
are transposed, tokens are rows of the tensor core's result, so 8 rows waste nothing. Every warp
writes a partial result; ``merge`` joins those of a row (Flash-Decoding, Dao et al., 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.tirx.script.builder import ir as T

from regraft.kernels.device import (
    BITS,
    Expr,
    address,
    call,
    let,
    load_words,
    registers,
    store,
    warp_max,
    warp_sum,
    wide,
)

BLOCK = 32
LOG2E = 1.4426950408889634
LOWEST = -1e30
SLACK = 6.0
"""Weights may reach 2**SLACK before the running maximum is raised."""


class Warp:
    """Where a thread is: its warp, lane and the lane's g and q."""

    def __init__(self, thread: Expr) -> None:
        self.index = let(thread // 32)
        self.lane = let(thread % 32)
        self.g = let(self.lane // 4)
        self.q = let(self.lane % 4)


class Flash:
    """The state of a warp's online softmax for ``tiles`` times 8 rows.

    A lane has rows 8 * tile + 2 * q + e, e in (0, 1), and of a block the tokens 8 * i + g, i in
    0..3: scores[8 * tile + 2 * i + e]. Maximum and scores are in units of log 2.
    """

    def __init__(self, warp: Warp, value_size: int, tiles: int) -> None:
        self.warp, self.tiles, self.parts = warp, tiles, value_size // 16
        self.out = registers(tiles * self.parts * 4)
        self.top = registers(tiles * 2)
        self.sum = registers(tiles * 2)
        self.zero = registers(tiles * 2)
        self.scores = registers(tiles * 8)
        self.weights = registers(tiles * 4, "uint32")
        for i in range(tiles * self.parts * 4):
            store(self.out, i, T.float32(0))
        for i in range(tiles * 2):
            store(self.top, i, T.float32(LOWEST))
            store(self.sum, i, T.float32(0))
            store(self.zero, i, T.float32(0))

    def clear(self) -> None:
        for i in range(self.tiles * 8):
            store(self.scores, i, T.float32(0))

    def softmax(
        self,
        dtype: str,
        shift: Sequence[Expr] = (),
        scale: Sequence[Expr] = (),
        zero: Sequence[Expr] = (),
        before_rescaling: Callable[[], None] | None = None,
    ) -> None:
        """Turn the scores of a block into weights, ready as operands of the product with values.

        shift, scale, zero: of the lane's tokens: log2 of the values' scale, which is part of the
        maximum, the scale and the zero. The weights without scale stay in ``scores``.
        """
        pairs = [(tile, e) for tile in range(self.tiles) for e in range(2)]

        def shifted(tile: int, e: int, i: int) -> Expr:
            score = self.scores[tile * 8 + i * 2 + e]
            return score + shift[i] if shift else score

        tops = []
        for tile, e in pairs:
            top = shifted(tile, e, 0)
            for i in range(1, 4):
                top = T.max(top, shifted(tile, e, i))
            tops.append(let(top))
        rises = tops[0] > self.top[0] + T.float32(SLACK)
        for row, top in enumerate(tops[1:], 1):
            rises = T.Or(rises, top > self.top[row] + T.float32(SLACK))
        with T.If(call("any", T.cast(rises, "int32")) != 0), T.Then():
            if before_rescaling:
                before_rescaling()
            for (tile, e), top in zip(pairs, tops, strict=True):
                row = tile * 2 + e
                highest = let(T.max(self.top[row], warp_max(top, (4, 8, 16))))
                factor = call("exp2", self.top[row] - highest)
                store(self.top, row, highest)
                store(self.sum, row, self.sum[row] * factor)
                store(self.zero, row, self.zero[row] * factor)
                for part in range(self.parts):
                    for half in range(2):
                        at = (tile * self.parts + part) * 4 + half * 2 + e
                        store(self.out, at, self.out[at] * factor)
        for tile in range(self.tiles):
            for i in range(4):
                scaled = []
                for e in range(2):
                    at, row = tile * 8 + i * 2 + e, tile * 2 + e
                    weight = call("exp2", self.scores[at] - self.top[row])
                    store(self.scores, at, weight)
                    store(self.sum, row, self.sum[row] + weight)
                    if zero:
                        store(self.zero, row, self.zero[row] + weight * zero[i])
                    scaled.append(weight * scale[i] if scale else weight)
                packed = call(f"pack_{BITS[dtype]}", *scaled)
                store(self.weights, tile * 4 + i, call("transpose", packed))

    def add_values(self, dtype: str, part: int, step: int, operand: Sequence[Expr]) -> None:
        """Add the product with values of 16 channels by 16 tokens, 4 words."""
        for tile in range(self.tiles):
            call(
                f"mma_{BITS[dtype]}",
                address(self.out, (tile * self.parts + part) * 4),
                *operand,
                self.weights[tile * 4 + 2 * step],
                self.weights[tile * 4 + 2 * step + 1],
            )

    def add_scores(self, dtype: str, half: int, operand: Sequence[Expr], query: Any, step: int):
        """Add the product of keys, 16 tokens by 16 channels, 4 words, with the queries."""
        steps = query.shape[0] // (2 * self.tiles)
        for tile in range(self.tiles):
            at = (tile * steps + step) * 2
            call(
                f"mma_{BITS[dtype]}",
                address(self.scores, tile * 8 + half * 4),
                *operand,
                query[at],
                query[at + 1],
            )

    def write(
        self,
        partial: tuple[Any, Any, Any],
        place: Expr,
        first: Expr,
        rows: Expr,
        channel: Callable[[int, int], Expr],
    ) -> None:
        """Write rows first.. of the partial result: outputs [place, rows, Dv], maximum and sum.

        channel(part, half) is the lane's channel.
        """
        outputs, tops, sums = partial
        for tile in range(self.tiles):
            for e in range(2):
                own = let(8 * tile + 2 * self.warp.q + e)
                row = let(first + own)
                total = let(warp_sum(self.sum[tile * 2 + e], (4, 8, 16)))
                zero = let(warp_sum(self.zero[tile * 2 + e], (4, 8, 16)))
                with T.If(row < rows), T.Then():
                    line = let(wide(place) * rows + wide(row))
                    with T.If(self.warp.g == 0), T.Then():
                        store(tops, line, self.top[tile * 2 + e])
                        store(sums, line, total)
                    for part in range(self.parts):
                        for half in range(2):
                            at = let(channel(part, half))
                            value = self.out[(tile * self.parts + part) * 4 + half * 2 + e] + zero
                            store(outputs, line * (self.parts * 16) + wide(at), value)


def dense_query(q: Any, base: Expr, first: Expr, rows: Expr, size: int, tiles: int, warp: Warp):
    """Operands of the queries [rows, size] at base for ``dense_scores``, 2 words a step."""
    width = _width(size)
    words = registers(tiles * size // 8, "uint32")
    for tile in range(tiles):
        row = let(first + 8 * tile + warp.g)
        for step in range(size // 16):
            load, place = divmod(step * 4, width)
            for half in range(2):
                channel = load * 4 * width + warp.q * width + place + 2 * half
                at = (tile * (size // 16) + step) * 2 + half
                store(words, at, T.uint32(0))
                with T.If(row < rows), T.Then():
                    index = base + wide(row * size + channel)
                    store(words, at, call("read4", address(q, index)))
    return words


def dense_scores(
    flash: Flash, dtype: str, k: Any, base: Expr, last: Expr, query: Any, size: int
) -> None:
    """Set the scores of 32 tokens of k, rows of ``size`` elements from base; last: the highest."""
    width, warp = _width(size), flash.warp
    loads = size // (4 * width)
    words = registers(loads * 4 * width // 2, "uint32")
    for load in range(loads):
        for i in range(4):
            token = T.min(8 * i + warp.g, last)
            index = base + wide(token * size + (load * 4 + warp.q) * width)
            load_words(words, (load * 4 + i) * width * 2, k, index, width * 2)
    flash.clear()
    for step in range(size // 16):
        load, place = divmod(step * 4, width)
        pieces = [
            [words[(load * 4 + i) * width // 2 + place // 2 + half] for i in range(4)]
            for half in range(2)
        ]
        for half in range(2):
            operand = [*pieces[0][2 * half : 2 * half + 2], *pieces[1][2 * half : 2 * half + 2]]
            flash.add_scores(dtype, half, operand, query, step)


def dense_values(flash: Flash, dtype: str, v: Any, base: Expr, last: Expr, size: int) -> None:
    """Add the weighted values of 32 tokens, rows of ``size`` elements from base."""
    warp = flash.warp
    part = 0
    for start, width in _runs(size):
        stride = max(width // 2, 1)
        words = registers(16 * stride, "uint32")
        for step in range(2):
            for place in range(4):
                token = T.min(16 * step + 8 * (place // 2) + 2 * warp.q + place % 2, last)
                for half in range(2):
                    index = base + wide(token * size + start + (half * 8 + warp.g) * width)
                    at = ((step * 4 + place) * 2 + half) * stride
                    load_words(words, at * 4, v, index, width * 2)
        for channel in range(width):
            for step in range(2):

                def pair(
                    place: int, half: int, step=step, channel=channel, stride=stride, words=words
                ) -> Expr:
                    at = [((step * 4 + place + e) * 2 + half) * stride for e in range(2)]
                    selector = 0x7632 if channel % 2 else 0x5410
                    both = [words[x + channel // 2] for x in at]
                    return call("permute", *both, T.uint32(selector))

                operand = [pair(0, 0), pair(0, 1), pair(2, 0), pair(2, 1)]
                flash.add_values(dtype, part + channel, step, operand)
        part += width


def dense_channel(warp: Warp, size: int) -> Callable[[int, int], Expr]:
    """The channel of a lane's part and half after ``dense_values``."""
    places = [(start, width, i) for start, width in _runs(size) for i in range(width)]

    def channel(part: int, half: int) -> Expr:
        start, width, i = places[part]
        return start + (half * 8 + warp.g) * width + i

    return channel


def merge(
    partial: tuple[Any, Any, Any],
    sinks: Any,
    out: Any,
    dtype: str,
    rows: Expr,
    queries: Expr,
    value_size: int,
    heads: Expr,
    batch: Expr,
    parts: Expr,
) -> None:
    """Launch: join the partial results of each row and the sinks' column into out."""
    outputs, tops, sums = partial
    lanes, groups = 16, 32
    with (
        T.launch_thread("blockIdx.x", rows) as row,
        T.launch_thread("blockIdx.y", value_size // lanes) as slice_,
        T.launch_thread("blockIdx.z", batch * heads) as place,
        T.launch_thread("threadIdx.x", lanes * groups) as thread,
    ):
        shared = T.alloc_buffer((groups * (lanes + 2),), "float32", scope="shared")
        sink = let(sinks[(place % heads) * (rows // queries) + row // queries] * T.float32(LOG2E))
        first = let(wide(place) * wide(parts))
        lane, group = let(thread % lanes), let(thread // lanes)
        state = registers(3)
        store(state, 0, T.max(sink, T.float32(LOWEST)))
        count = let((parts + lanes * groups - 1) // (lanes * groups))
        with T.serial(0, count) as i:
            part = let(i * (lanes * groups) + thread)
            with T.If(part < parts), T.Then():
                store(state, 0, T.max(state[0], tops[(first + wide(part)) * rows + wide(row)]))
        for mask in (1, 2, 4, 8, 16):
            store(state, 0, T.max(state[0], call("across", state[0], mask)))
        with T.If(thread % 32 == 0), T.Then():
            store(shared, thread // 32, state[0])
        T.evaluate(T.tvm_storage_sync("shared"))
        for i in range(lanes * groups // 32):
            store(state, 0, T.max(state[0], shared[i]))
        T.evaluate(T.tvm_storage_sync("shared"))
        store(state, 1, T.float32(0))
        store(state, 2, T.float32(0))
        turns = let((parts - group + groups - 1) // groups)
        with T.serial(0, turns, annotations={"pragma_unroll_explicit": 0}) as i:
            line = let((first + wide(i * groups + group)) * rows + wide(row))
            weight = call("exp2", tops[line] - state[0])
            store(state, 1, state[1] + weight * sums[line])
            channel = wide(slice_ * lanes + lane)
            store(state, 2, state[2] + weight * outputs[line * value_size + channel])
        store(shared, group * lanes + lane, state[2])
        with T.If(lane == 0), T.Then():
            store(shared, groups * lanes + group, state[1])
        T.evaluate(T.tvm_storage_sync("shared"))
        with T.If(thread < lanes), T.Then():
            total, value = registers(1), registers(1)
            store(total, 0, call("exp2", sink - state[0]))
            store(value, 0, T.float32(0))
            for i in range(groups):
                store(total, 0, total[0] + shared[groups * lanes + i])
                store(value, 0, value[0] + shared[i * lanes + thread])
            result = T.if_then_else(total[0] > 0, value[0] / total[0], T.float32(0))
            index = wide(place * rows + row) * value_size + wide(slice_ * lanes + thread)
            store(out, index, T.cast(result, dtype))


def _width(size: int) -> int:
    """Channels that a lane loads at once for the scores."""
    return 8 if size % 32 == 0 else 4


def _runs(size: int) -> list[tuple[int, int]]:
    """Runs of channels, (start, width): 16 lanes of ``width`` channels each."""
    runs, start = [], 0
    while start < size:
        width = next(w for w in (8, 4, 2, 1) if 16 * w <= size - start)
        runs.append((start, width))
        start += 16 * width
    return runs
