"""Tokens through the graphs of a program: all at once, or in the pieces that its graphs take."""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.program import Program
from regraft.runtime.cache import CacheState
from regraft.runtime.lower import lower


class Steps:
    """Runs a program that keeps its state in a CacheState.

    A program for any number of tokens runs them in one call. One for single tokens runs a prompt
    in the largest pieces that its prefill takes, and what follows a prompt token by token, so
    that each of the last tokens can be taken back.
    """

    def __init__(self, program: Program) -> None:
        self.single = program.tokens is not None
        self.rollback = program.cache.rollback
        self.step, self.regions = lower(program)
        self.prefill = None if program.prefill is None else lower(program.prefill)[0]
        self.limit = None if program.prefill is None else program.prefill.tokens

    def __call__(
        self, ids: Tensor, mask: Tensor, positions: Tensor, keep: Tensor, cache: CacheState
    ) -> Tensor:
        """ids, positions [batch, length], mask [batch, past + length], keep [kept] -> logits."""
        if not self.single:
            return self.step(ids, mask, positions, keep, cache)
        past, start = cache.length, 0
        logits, order = [], []
        for size in self._pieces(past, ids.shape[1]):
            stop = start + size
            here = ((keep >= start) & (keep < stop)).nonzero().flatten()
            run = self.step if size == 1 else self.prefill
            part = slice(start, stop)
            made = run(
                ids[:, part], mask[:, : past + stop], positions[:, part], keep[here] - start, cache
            )
            logits.append(made)
            order.append(here)
            start = stop
        return torch.cat(logits, 1)[:, torch.cat(order).argsort()]

    def _pieces(self, past: int, length: int) -> list[int]:
        if self.prefill is None or (past and length <= self.rollback):
            return [1] * length
        largest = min(self.limit or length, length)
        pieces = [largest] * (length // largest)
        return pieces + [length % largest] * (length % largest > 0)
