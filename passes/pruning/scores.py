"""How much a head or filter counts for, without gradients: what others go by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from regraft.passes.pruning.blocks import Block
from regraft.passes.pruning.moments import Moments
from regraft.passes.pruning.samples import Sample
from regraft.passes.pruning.slicing import weights
from regraft.passes.recorder import Runner
from regraft.program import Program

TOKENS = 16_384


def magnitude(program: Program, blocks: Sequence[Block]) -> list[Tensor]:
    """Squared norm of all weights of a unit [units], each linear layer's mean set to 1."""
    found = []
    for block in blocks:
        total = torch.zeros(block.units)
        weight, _ = weights(program, block.output)
        parts = [weight.square().sum(0).view(block.units, -1).sum(1)]
        for linear, _ in block.inputs:
            parts.append(weights(program, linear)[0].square().view(block.units, -1).sum(1))
        for part in parts:
            total += (part / part.mean()).cpu()
        found.append(total)
    return found


def chance(blocks: Sequence[Block], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(block.units, generator=generator) for block in blocks]


def fluctuation(
    program: Program,
    blocks: Sequence[Block],
    found: Sequence[Sample],
    tell: Callable[[str], None],
) -> list[Tensor]:
    """Variance of a column's input times its weight's squared norm, standardised by layer.

    What FLAP (arXiv 2312.11983) calls WIFV and AL-AM; smallest 0.
    """
    moments = [Moments() for _ in blocks]
    seen = 0
    for sample in found:
        if seen >= TOKENS:
            break
        seen += sample.rows if sample.real is None else int(sample.real.sum())
        tell("fluctuations")

        def watch(index: int, *args: Any, real: Tensor | None = sample.real) -> tuple[Any, ...]:
            x = args[0]
            rows = x[real] if real is not None and x.shape[:-1] == real.shape else x
            _add(moments[index], rows.reshape(-1, x.shape[-1]))
            return args

        edits: dict[fx.Node, Any] = {
            block.output: (lambda *args, i=i: watch(i, *args)) for i, block in enumerate(blocks)
        }
        with torch.no_grad():
            Runner(program, edits).run(*sample.inputs)
    scores = []
    for block, sums in zip(blocks, moments, strict=True):
        mean = sums.x / sums.rows
        variance = sums.xx / sums.rows - mean.square()
        norm = weights(program, block.output)[0].double().square().sum(0)
        score = (variance * norm).view(block.units, -1).mean(1)
        scores.append((score - score.mean()) / score.std().clamp(min=1e-12))
    low = min(float(score.min()) for score in scores)
    return [(score - low).float().cpu() for score in scores]


def _add(sums: Moments, x: Tensor) -> None:
    """Count rows, sums and squares of columns."""
    sums.rows += len(x)
    sums.x = sums.x + x.double().sum(0)
    sums.xx = sums.xx + x.double().square().sum(0)
