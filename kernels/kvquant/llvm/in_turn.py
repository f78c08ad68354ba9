"""Coding a head's channels in turn, with error feedback, for the 32 tokens of a block at once."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.llvm.simd import (
    Expr,
    Floats,
    fill,
    get,
    load,
    local,
    loop,
    put,
    store,
    unfused,
)

TOKENS, LANES = 32, 8
FLOATS = Floats(LANES)


class Turns:
    """What the channels of a head aim at, [channel, token]; lanes are tokens."""

    def __init__(self, block: Any) -> None:
        self.block, self.size = block, block.shape.size
        self.y, self.aims = (local((self.size, TOKENS)) for _ in range(2))
        self.exact = local((self.size, TOKENS), "int32")

    def clear(self) -> None:
        """No element is exact."""
        with loop(self.size) as channel, loop(TOKENS // LANES) as i:
            store(self.exact, fill(0, "int32", LANES), channel, i * LANES, lanes=LANES)

    def mark(self, token: Expr, channel: Expr) -> None:
        """An outlier leaves no error."""
        put(self.exact, T.int32(1), channel, token)

    def moved(self, token: Expr, channel: Expr) -> Expr:
        """How far the aim of an element lies from it, normalised."""
        return T.Bind(get(self.aims, channel, token) - get(self.y, channel, token))

    def code(self, head: Expr) -> None:
        """Write the head's codes to the block's ``coded``; see ``reference.encode``."""
        self._start(head)
        errors = local((TOKENS,))
        with loop(self.size) as i:
            channel = self._channel(i)
            with loop(TOKENS // LANES) as part:
                self._round(channel, part * LANES, errors)
            with loop(self.size, i + 1) as j:
                later = self._channel(j)
                share = FLOATS.of(T.Bind(get(self.block.a.matrix, head, i, j)))
                with loop(TOKENS // LANES) as part:
                    added = unfused(load(errors, part * LANES, lanes=LANES) * share, LANES)
                    aim = load(self.aims, later, part * LANES, lanes=LANES) + added
                    store(self.aims, aim, later, part * LANES, lanes=LANES)

    def _start(self, head: Expr) -> None:
        row = local((LANES,))
        with loop(TOKENS) as token, loop(self.size // LANES) as i:
            store(row, self.block.normalised(head, token, i * LANES), 0, lanes=LANES)
            for lane in range(LANES):
                for kept in (self.y, self.aims):
                    put(kept, get(row, lane), i * LANES + lane, token)

    def _round(self, channel: Expr, token: Expr, errors: Any) -> None:
        aim = load(self.aims, channel, token, lanes=LANES)
        codes = local((LANES,), "int32")
        store(codes, self.block.codes(aim), 0, lanes=LANES)
        for lane in range(LANES):
            put(self.block.coded, get(codes, lane), token + lane, channel)
        exact = load(self.exact, channel, token, lanes=LANES) != fill(0, "int32", LANES)
        read = T.Select(exact, aim, self.block.read(aim))
        error = load(self.y, channel, token, lanes=LANES) - read
        store(errors, error, token, lanes=LANES)

    def _channel(self, i: Expr) -> Expr:
        """The i-th of ``feedback.turns``."""
        slow = T.int64(self.size // 2 - 1) - T.shift_right(i, T.int64(1))
        upper = T.bitwise_and(i, T.int64(1)) == T.int64(0)
        return T.Bind(slow + T.Select(upper, T.int64(self.size // 2), T.int64(0)))
