"""Structured pruning without retraining: heads and filters found, cut out, and made up for."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from regraft.passes.base import Context, Pass, PassResult
from regraft.passes.fuse_linear import FuseLinear, split_fused
from regraft.passes.packed import refuse_packed
from regraft.passes.pruning import scores
from regraft.passes.pruning.blocks import Block, find
from regraft.passes.pruning.fisher import Gradients, gradients
from regraft.passes.pruning.latency import Latency
from regraft.passes.pruning.masks import Masks
from regraft.passes.pruning.refit import refit
from regraft.passes.pruning.samples import Sample, mean_length, samples
from regraft.passes.pruning.search import rearranged, search
from regraft.passes.pruning.slicing import Cut, cut
from regraft.program import Program, RegraftError
from regraft.program.program import source_of

METHODS = ("fisher", "reconstruct")
SCORES = ("fisher", "fluctuation", "magnitude", "random")
TRIES = 3
"""How often a budget of latency is met anew after what was found was measured."""


@dataclass(frozen=True)
class Prune(Pass):
    """heads, filters -> fewer of each, weights cut                 lossy: within the budget

    macs: the share of the blocks' multiplications to keep, at ``sequence_length`` tokens (None:
    the mean of the calibration data); or latency: the share of the program's time, measured here
    at ``batch`` rows of that length. Units are attention heads (with grouped keys, all heads that
    share one) and filters of feed-forward layers, these in multiples of ``round_to``.

    Up to ``samples`` rows of calibration, drawn by ``seed``, tell what each unit counts for (its
    diagonal Fisher information; labels=True: of the batches' labels, else of the model's own
    output). ``rearrange`` trades units within a layer by what they cost together; ``tune`` scales
    those kept. method "reconstruct" instead fits the weights that read them anew, and a bias.
    score: "fluctuation", "magnitude" or "random" in the place of Fisher information. masks: a file
    that ``save_masks`` wrote, applied as it is.
    Source: Kwon et al. (arXiv 2204.09656); bias of what was cut: FLAP (arXiv 2312.11983).
    """

    macs: float | None = None
    latency: float | None = None
    method: str = "fisher"
    samples: int = 2048
    sequence_length: int | None = None
    labels: bool = False
    score: str = "fisher"
    rearrange: bool = True
    tune: bool = True
    round_to: int = 16
    batch: int = 1
    seed: int = 0
    masks: str | None = None
    tolerance: ClassVar[float | None] = None
    reads_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        asked = [x for x in (self.macs, self.latency) if x is not None]
        if len(asked) > 1 or (asked and self.masks is not None):
            raise RegraftError("Prune: one of macs, latency and masks is given")
        if asked and not 0 < asked[0] <= 1:
            raise RegraftError(f"Prune: {asked[0]} is no share between 0 and 1")
        if self.method not in METHODS or self.score not in SCORES:
            known = f"methods {', '.join(METHODS)}; scores {', '.join(SCORES)}"
            raise RegraftError(f"Prune(method={self.method!r}, score={self.score!r}): {known}")
        if min(self.samples, self.round_to, self.batch, self.sequence_length or 1) < 1:
            raise RegraftError("Prune: samples, round_to, batch, sequence_length are at least 1")

    def identity(self) -> str:
        if self.masks is None:
            return repr(self)
        try:
            return f"{self} {hashlib.sha256(Path(self.masks).read_bytes()).hexdigest()}"
        except OSError as error:
            raise RegraftError(f"{self.masks} cannot be read: {error}") from error

    def apply(self, program: Program, context: Context) -> PassResult:
        if self.macs is None and self.latency is None and self.masks is None:
            raise RegraftError("Prune needs a budget: macs=0.6, latency=0.6, or masks=FILE")
        if program.prefill is not None:
            raise RegraftError("Prune: models with recurrent layers are not pruned yet")
        refuse_packed(program, "Prune")
        _refuse_dropout(program)
        fused = split_fused(program)
        try:
            blocks, skipped = find(program)
            if not blocks:
                return PassResult(0, tuple(skipped))
            if self.masks is not None:
                masks = Masks.load(self.masks)
                masks.fit(blocks)
            else:
                masks, notes = self._chosen(program, blocks, context)
                skipped += notes
            cut(program, blocks, masks.cuts)
            program.metadata["masks"] = masks
        finally:
            program.graph.eliminate_dead_code()
            if fused:
                FuseLinear().apply(program, context)
        return PassResult(len(blocks), tuple(skipped), masks.picture())

    def _chosen(
        self, program: Program, blocks: Sequence[Block], context: Context
    ) -> tuple[Masks, list[tuple[str, str]]]:
        seconds: dict[str, float] = {}
        found = samples(program, context.calibration, self.samples, self.seed)
        default = _length(blocks)
        tokens = float(self.sequence_length or mean_length(found, default))
        gathered: Gradients | None = None
        with _clock(seconds, "scores"):
            if self.score == "fisher":
                labelled = self.labels
                gathered = gradients(program, blocks, found, labelled, context.tell)
                importance = [g.square().mean(0) for g in gathered.units]
            else:
                importance = self._scores(program, blocks, found, tokens, context.tell)
        with _clock(seconds, "search"):
            kept = self._search(program, blocks, importance, tokens, context.tell)
        if self.rearrange and gathered is not None:
            with _clock(seconds, "rearrange"):
                pairs = zip(gathered.units, kept, strict=True)
                kept = [rearranged(gradient, units) for gradient, units in pairs]
        cuts, notes = [Cut(units) for units in kept], []
        if self.tune or self.method == "reconstruct":
            method = "tune" if self.method == "fisher" else self.method
            reached = gathered.reached if gathered is not None else None
            with _clock(seconds, method):
                cuts, notes = refit(program, blocks, kept, found, reached, method, context.tell)
        return Masks.of(blocks, cuts, tokens, seconds=seconds), notes

    def _scores(
        self,
        program: Program,
        blocks: Sequence[Block],
        found: Sequence[Sample],
        tokens: float,
        tell: Callable[[str], None],
    ) -> list[Tensor]:
        """Scores of units by their multiplications, as if each stood for as many parts."""
        if self.score == "magnitude":
            made = scores.magnitude(program, blocks)
        elif self.score == "random":
            made = scores.chance(blocks, self.seed)
        else:
            made = scores.fluctuation(program, blocks, found, tell)
        return [x * block.macs(tokens) for x, block in zip(made, blocks, strict=True)]

    def _search(
        self,
        program: Program,
        blocks: Sequence[Block],
        importance: Sequence[Tensor],
        tokens: float,
        tell: Callable[[str], None],
    ) -> list[Tensor]:
        if self.latency is None:
            assert self.macs is not None
            each = [block.macs(tokens) for block in blocks]
            whole = sum(cost * block.units for cost, block in zip(each, blocks, strict=True))
            return search(
                blocks, importance, lambda i, n: each[i] * n, self.macs * whole, self.round_to
            )
        measured = Latency(program, self.batch, round(tokens), tell)
        aim = self.latency
        for _ in range(TRIES):
            budget = aim * measured.dense - measured.rest
            if budget <= 0:
                least = measured.rest / measured.dense
                raise RegraftError(
                    f"Prune(latency={self.latency}): the least that can be reached is {least:.2f}"
                )
            kept = search(blocks, importance, measured.of, budget, self.round_to)
            share = measured.share(kept)
            if 0.97 * self.latency <= share <= self.latency:
                break
            aim *= 0.985 * self.latency / share
        return kept


def _refuse_dropout(program: Program) -> None:
    aten = torch.ops.aten
    for node in program.graph.find_nodes(op="call_function", target=aten.dropout.default):
        if node.args[2]:
            raise RegraftError(
                f"{source_of(node)} drops at random: capture the model in evaluation mode"
            )
    for name in ("native_dropout", "_fused_dropout", "bernoulli"):
        target = getattr(getattr(aten, name), "default", None)
        if target and (nodes := program.graph.find_nodes(op="call_function", target=target)):
            raise RegraftError(
                f"{source_of(nodes[0])} drops at random: capture the model in evaluation mode"
            )


def _length(blocks: Sequence[Block]) -> float:
    """The constant length of sequences, where the graph knows it."""
    sizes = [block.output.meta["val"].shape for block in blocks]
    return next((float(s[-2]) for s in sizes if len(s) > 2 and isinstance(s[-2], int)), 1.0)


@contextmanager
def _clock(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
