"""Tokens through the graphs of a program: all at once, or in the pieces that its graphs take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from regraft.program import Program
from regraft.runtime.cache import CacheState
from regraft.runtime.cuda_graph import DecodeGraph
from regraft.runtime.lower import lower
from regraft.runtime.recurrent import growing
from regraft.runtime.regions import Region


class Steps:
    """Runs a program that keeps its state in a CacheState.

    A program for any number of tokens runs them in one call. One for single tokens runs a prompt
    in the largest pieces that its prefill takes, and what follows a prompt token by token, so
    that each of the last tokens can be taken back.
    """

    def __init__(self, program: Program) -> None:
        self.single = program.tokens == (1, 1)
        self.apart = program.inputs[0].shape[0] == 1
        self.rollback = 0 if growing(program.cache.states) else program.cache.rollback
        self.regions: dict[str, Region] = {}
        self.step, self.prefill = self._lower(program, ""), None
        self.graph = DecodeGraph(self.step)
        self.shortest, self.longest = 2, None
        if program.prefill is not None:
            self.prefill = self._lower(program.prefill, "prefill.")
            self.shortest, self.longest = program.prefill.tokens

    def _lower(self, program: Program, prefix: str) -> fx.GraphModule:
        module, regions = lower(program)
        self.regions |= {prefix + name: region for name, region in regions.items()}
        return module

    def __call__(
        self, ids: Tensor, mask: Tensor, positions: Tensor, keep: Tensor, cache: CacheState
    ) -> Tensor:
        """ids, positions [batch, length], mask [batch, past + length], keep [kept] -> logits."""
        if self.graph.takes(ids, cache):
            return self.graph(ids, (mask, positions, keep), cache)
        if not self.single:
            return self.step(ids, mask, positions, keep, cache)
        past, start = cache.length, 0
        logits, order = [], []
        for size in self._pieces(past, ids.shape[1]):
            stop = start + size
            here = ((keep >= start) & (keep < stop)).nonzero().flatten()
            run = self.step if size == 1 or self.prefill is None else self.prefill
            part = slice(start, stop)
            given = ids[:, part], mask[:, : past + stop], positions[:, part], keep[here] - start
            logits.append(_apart(run, *given, cache) if self.apart else run(*given, cache))
            order.append(here)
            start = stop
        return torch.cat(logits, 1)[:, torch.cat(order).argsort()]

    def _pieces(self, past: int, length: int) -> list[int]:
        if self.prefill is None or (past and length <= self.rollback):
            return [1] * length
        largest = min(self.longest or length, length)
        if largest < self.shortest:
            return [1] * length
        count, rest = divmod(length, largest)
        return [largest] * count + ([rest] if rest >= self.shortest else [1] * rest)


def _apart(
    run: Callable, ids: Tensor, mask: Tensor, positions: Tensor, keep: Tensor, cache: CacheState
) -> Tensor:
    """Row by row, for a graph of one row."""
    assert cache.states is not None
    alone = cache.states.split(ids.shape[0])
    rows = zip(ids.split(1), mask.split(1), positions.split(1), alone, strict=True)
    logits = [run(*row, keep, CacheState([], states=own)) for *row, own in rows]
    cache.states.join(alone, ids.shape[1])
    return torch.cat(logits)
