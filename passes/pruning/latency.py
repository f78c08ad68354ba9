"""How long blocks take with fewer units, measured on the graph as it runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from regraft.kernels.linear.reference import linear
from regraft.passes.pruning.blocks import Block, find, has_query_heads
from regraft.passes.pruning.search import counts
from regraft.passes.pruning.slicing import Cut, cut
from regraft.program import Program, RegraftError

WIDTHS, ROUNDS = (1.0, 0.75, 0.5, 0.25, 0.0), 9
"""Shares of units that are measured, and how often."""


class Latency:
    """Seconds of a program by how many units its blocks keep, at ``batch`` rows of ``tokens``.

    Blocks of one kind and size are cut alike at each of WIDTHS; the whole program is timed, widths
    in turn, and a block's part is the difference to none of its kind, divided by their number.
    Between widths times are interpolated.
    """

    def __init__(
        self,
        program: Program,
        blocks: Sequence[Block],
        batch: int,
        tokens: int,
        tell: Callable[[str], None],
    ) -> None:
        self.program, self._sizes = program, (batch, tokens)
        self._blocks = blocks
        self._query_heads = has_query_heads(blocks)
        self._groups: dict[tuple, list[int]] = {}
        for index, block in enumerate(blocks):
            self._groups.setdefault(_key(block), []).append(index)
        variants: dict[Any, Any] = {("dense", 0.0): self._timed(program)}
        for key, members in self._groups.items():
            for share in WIDTHS[1:]:
                keep = {i: _kept(blocks[i], share) for i in members}
                variants[key, share] = self._timed(self._sliced(keep))
        tell("measuring latency")
        seconds = timings(variants)
        self.dense = seconds["dense", 0.0]
        self._tables: list[tuple[list[int], list[float]]] = [([], [])] * len(blocks)
        self.rest = self.dense
        for key, members in self._groups.items():
            units = [_kept(blocks[members[0]], share) for share in WIDTHS]
            whole = [self.dense, *(seconds[key, share] for share in WIDTHS[1:])]
            none = min(whole)
            parts = [max(0.0, (each - none) / len(members)) for each in whole]
            parts = list(np.minimum.accumulate(parts))
            self.rest -= len(members) * parts[0]
            for index in members:
                self._tables[index] = units[::-1], parts[::-1]

    def of(self, index: int, units: int) -> float:
        """What block ``index`` adds with so many units."""
        known, seconds = self._tables[index]
        return float(np.interp(units, known, seconds))

    def least(self, round_to: int) -> float:
        """What the blocks add with as few units as they can have."""
        fewest = (counts(block, round_to)[0] for block in self._blocks)
        return sum(self.of(index, units) for index, units in enumerate(fewest))

    def share(self, kept: Sequence[Tensor]) -> float:
        """Measured: the time of the program cut like this, as a share of the program's own."""
        keep = {index: len(units) for index, units in enumerate(kept)}
        pair = {"dense": self._timed(self.program), "cut": self._timed(self._sliced(keep))}
        seconds = timings(pair, 2 * ROUNDS)
        return seconds["cut"] / seconds["dense"]

    def _timed(self, program: Program) -> Callable[[], None]:
        return timed(program, *self._sizes)

    def _sliced(self, keep: dict[int, int]) -> Program:
        """A copy that keeps the first so many units of these blocks."""
        made = self.program.copy()
        blocks = find(made, self._query_heads)[0]
        chosen = [blocks[index] for index in keep]
        counts = zip(chosen, keep.values(), strict=True)
        cut(made, chosen, [Cut(block.first(count)) for block, count in counts])
        made.graph.eliminate_dead_code()
        made.graph_module.recompile()
        return made


def inputs(program: Program, batch: int, tokens: int) -> tuple[Tensor, ...]:
    """Inputs of so many rows and tokens: zeros for ids, ones for masks, an empty past."""
    made = []
    for spec, example in zip(program.inputs, program.examples, strict=True):
        sizes = {"batch_size": batch, "past_sequence_length": 0}
        shape = [n if isinstance(n, int) else sizes.get(n, tokens) for n in spec.shape]
        if example.is_floating_point():
            made.append(torch.zeros(shape, dtype=example.dtype, device=example.device))
        elif "mask" in spec.name:
            made.append(torch.ones(shape, dtype=example.dtype, device=example.device))
        elif spec.role == "positions":
            places = torch.arange(shape[-1], device=example.device)
            made.append(places.expand(shape).contiguous())
        else:
            made.append(torch.zeros(shape, dtype=example.dtype, device=example.device))
    return tuple(made)


def timings(
    variants: dict[Any, Callable[[], None]], rounds: int = ROUNDS
) -> dict[tuple | str, float]:
    """Median seconds of each, in turn, after one turn that does not count."""
    samples: dict[tuple | str, list[float]] = {name: [] for name in variants}
    try:
        for turn in range(rounds + 1):
            for name, run in variants.items():
                start = time.perf_counter()
                run()
                if turn:
                    samples[name].append(time.perf_counter() - start)
    except (RuntimeError, IndexError) as error:
        raise RegraftError(f"the latency cannot be measured on inputs of zeros: {error}") from error
    return {name: statistics.median(found) for name, found in samples.items()}


def _key(block: Block) -> tuple:
    return block.kind, block.units, block.groups, block.parts, block.width, block.macs(0)


def _kept(block: Block, share: float) -> int:
    return max(block.least, block.groups * round(share * block.units / block.groups))


def timed(program: Program, batch: int, tokens: int) -> Callable[[], None]:
    """A run of the program on ``inputs``, with the linear layers that compiled programs use."""
    given = inputs(program, batch, tokens)
    graph: fx.Graph = program.copy().graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        node.target = linear
    module = fx.GraphModule(program.graph_module, graph)

    def run() -> None:
        with torch.no_grad():
            module(*given)
        if given[0].is_cuda:
            torch.cuda.synchronize()

    return run
