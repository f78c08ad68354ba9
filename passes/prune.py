"""Structured pruning without retraining: heads and filters found, cut out, and made up for."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from regraft.passes.base import Context, Pass, PassResult
from regraft.passes.fuse_linear import FuseLinear, split_fused
from regraft.passes.packed import refuse_packed
from regraft.passes.pruning import scores
from regraft.passes.pruning.blocks import Block, find, has_query_heads
from regraft.passes.pruning.fisher import Gradients, gradients
from regraft.passes.pruning.latency import Latency
from regraft.passes.pruning.masks import Masks
from regraft.passes.pruning.ranks import Ranks
from regraft.passes.pruning.refit import refit
from regraft.passes.pruning.samples import Sample, is_decoder, mean_length, samples
from regraft.passes.pruning.search import rearranged, search
from regraft.passes.pruning.slicing import Cut, cut
from regraft.passes.raise_linear import RaiseLinear
from regraft.program import Program, RegraftError
from regraft.program.program import source_of

log = logging.getLogger("regraft")
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
    share one; ``query_heads``, or where all heads share one: heads, as many of each group) and
    filters of feed-forward layers, these in multiples of ``round_to``.

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
    query_heads: bool = False
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
        if self.labels and self.score != "fisher":
            raise RegraftError(f"Prune: the score {self.score!r} reads no labels")
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
        roles = {spec.role for spec in program.inputs}
        if "cache" in roles and not is_decoder(program):
            why = "the decoder of an encoder-decoder: no calibration gives its inputs"
            return PassResult(0, (("decoder", why),))
        RaiseLinear().apply(program, context)
        fused = split_fused(program)
        try:
            loaded = None if self.masks is None else Masks.load(self.masks)
            query_heads = self.query_heads if loaded is None else has_query_heads(loaded.layouts)
            blocks, skipped = find(program, query_heads)
            if not blocks:
                return PassResult(0, tuple(skipped))
            if loaded is not None:
                masks = loaded
                masks.fit(blocks)
            else:
                found = samples(program, context.calibration, self.samples, self.seed)
                masks, notes = self.choose(program, blocks, found, context.tell)
                skipped += notes
            cut(program, blocks, masks.cuts)
            program.metadata["masks"] = masks
        finally:
            program.graph.eliminate_dead_code()
            if fused:
                FuseLinear().apply(program, context)
        return PassResult(len(blocks), tuple(skipped), masks.picture())

    def choose(
        self,
        program: Program,
        blocks: Sequence[Block],
        found: Sequence[Sample],
        tell: Callable[[str], None],
        gathered: Gradients | None = None,
    ) -> tuple[Masks, list[tuple[str, str]]]:
        """What to keep of the blocks, and which blocks could not be fitted and why.

        gathered: ``gradients`` of the same samples, where several budgets share them.
        """
        seconds: dict[str, float] = {}
        tokens = float(self.sequence_length or mean_length(found, _length(blocks)))
        with _clock(seconds, "scores"):
            if self.score != "fisher":
                importance = self._scores(program, blocks, found, tokens, tell)
            else:
                gathered = gathered or gradients(program, blocks, found, self.labels, tell)
                importance = [g.square().mean(0) for g in gathered.units]
        ranks = [Ranks(block, x) for block, x in zip(blocks, importance, strict=True)]
        with _clock(seconds, "search"):
            summed = [r.sums(x) for r, x in zip(ranks, importance, strict=True)]
            chosen = self._search(program, blocks, ranks, summed, tokens, tell)
        if self.rearrange and gathered is not None:
            with _clock(seconds, "rearrange"):
                triples = zip(ranks, gathered.units, chosen, strict=True)
                chosen = [rearranged(r.sums(gradient), kept) for r, gradient, kept in triples]
        kept = [r.units(some) for r, some in zip(ranks, chosen, strict=True)]
        cuts, notes = [Cut(units) for units in kept], []
        if self.tune or self.method == "reconstruct":
            method = "tune" if self.method == "fisher" else self.method
            tokens_of = gathered.tokens if gathered is not None else None
            with _clock(seconds, method):
                cuts, notes = refit(program, blocks, kept, found, tokens_of, method, tell)
        if gathered is not None and (few := _too_few(blocks, gathered, kept)):
            if not any("too few samples" in why for _, why in notes):
                log.warning("regraft: %s: %s", *few)
            notes.append(few)
        return Masks.of(blocks, [one.cpu() for one in cuts], tokens, seconds=seconds), notes

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
        ranks: Sequence[Ranks],
        importance: Sequence[Tensor],
        tokens: float,
        tell: Callable[[str], None],
    ) -> list[Tensor]:
        """The ranks to keep of each block."""

        def found(cost: Callable[[int, int], float], budget: float) -> list[Tensor]:
            def of_ranks(i: int, n: int) -> float:
                return cost(i, n * blocks[i].groups)

            return search([r.block for r in ranks], importance, of_ranks, budget, self.round_to)

        if self.latency is None:
            assert self.macs is not None
            whole = sum(block.cost(block.units, tokens) for block in blocks)
            return found(lambda i, n: blocks[i].cost(n, tokens), self.macs * whole)
        measured = Latency(program, blocks, self.batch, round(tokens), tell)
        least = 1.01 * measured.least(self.round_to)
        aim, tries = self.latency, []
        while len(tries) < TRIES and (budget := aim * measured.dense - measured.rest) > least:
            kept = found(measured.of, budget)
            share = measured.share([r.units(some) for r, some in zip(ranks, kept, strict=True)])
            tries.append((share > self.latency, abs(share - self.latency), kept))
            if 0.97 * self.latency <= share <= self.latency:
                break
            aim *= 0.985 * self.latency / share
        if not tries:
            percent = math.ceil(100 * (least + measured.rest) / measured.dense)
            raise RegraftError(
                f"Prune(latency={self.latency}): the least that can be reached is {percent / 100}"
            )
        return min(tries, key=lambda one: one[:2])[2]


def _refuse_dropout(program: Program) -> None:
    for node in program.graph.nodes:
        if _is_random(node):
            raise RegraftError(
                f"{source_of(node)} drops at random: capture the model in evaluation mode"
            )


def _is_random(node: fx.Node) -> bool:
    """Whether an operator draws numbers, and is not one of those that are told not to."""
    target: Any = node.target
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    given = {a.name: a.default_value for a in target._schema.arguments}
    given |= dict(zip(given, node.args, strict=False)) | node.kwargs
    return all(given.get(name, 1) != 0 for name in ("train", "training", "p", "dropout_p"))


def _too_few(
    blocks: Sequence[Block], gathered: Gradients, kept: Sequence[Tensor]
) -> tuple[str, str] | None:
    """Where Fisher information of as many rows cannot tell apart all that was cut."""
    most, block, units = max(
        (
            (block.units - len(some), block, units)
            for block, units, some in zip(blocks, gathered.units, kept, strict=True)
        ),
        key=lambda one: one[0],
    )
    rank = int(units.any(1).sum())
    if rank >= most:
        return None
    return block.name, f"too few samples: Fisher information of rank {rank} for {most} cut"


def _length(blocks: Sequence[Block]) -> float:
    """The constant length of sequences, where the graph knows it."""
    sizes = [block.output.meta["val"].shape for block in blocks]
    return next((float(s[-2]) for s in sizes if len(s) > 2 and isinstance(s[-2], int)), 1.0)


@contextmanager
def _clock(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
