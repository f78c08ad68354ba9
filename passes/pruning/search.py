"""Which units to keep: those whose loss is least within a budget, then better together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from regraft.passes.budget import Option, cheapest
from regraft.passes.pruning.blocks import Block
from regraft.program import RegraftError

SLOTS = 20_000
"""Into so many equal parts a budget is divided; costs are rounded up to whole ones."""


def counts(block: Block, round_to: int) -> list[int]:
    """The numbers of units that may be kept."""
    step = round_to if block.attention is None else 1
    return sorted({block.least * step, *range(block.least * step, block.units, step), block.units})


def search(
    blocks: Sequence[Block],
    importance: Sequence[Tensor],
    cost: Callable[[int, int], float],
    budget: float,
    round_to: int,
) -> list[Tensor]:
    """The units to keep of each block, ascending, of least total importance cut.

    importance: [units] of each block; cost(i, n): what block i costs with n units; budget: what
    all may cost together. Exact for importances that add up (the diagonal of the Fisher matrix)
    up to 1/SLOTS of the budget. RegraftError where the budget is below the least.
    Source: Kwon et al. (arXiv 2204.09656), there for equal costs by enumeration.
    """
    if sum(cost(i, block.units) for i, block in enumerate(blocks)) <= budget:
        return [torch.arange(block.units) for block in blocks]
    unit = budget / SLOTS
    options, order = [], []
    for index, (block, values) in enumerate(zip(blocks, importance, strict=True)):
        ranked = values.double().argsort(stable=True)
        lost = torch.cat([torch.zeros(1), values[ranked].double().cumsum(0)])
        order.append(ranked)
        options.append(
            [
                Option(-int(-cost(index, n) // unit), float(lost[block.units - n]), n)
                for n in counts(block, round_to)
            ]
        )
    try:
        chosen = cheapest(options, SLOTS)
    except ValueError:
        full = sum(cost(i, block.units) for i, block in enumerate(blocks))
        least = sum(cost(i, counts(b, round_to)[0]) for i, b in enumerate(blocks))
        percent = math.ceil(100 * least / full)
        raise RegraftError(
            f"a budget of {budget / full:.2f} cannot be kept: the least is {percent / 100}"
        ) from None
    return [
        ranked[len(ranked) - option.choice :].sort().values
        for ranked, option in zip(order, chosen, strict=True)
    ]


def rearranged(gradient: Tensor, kept: Tensor) -> Tensor:
    """As many units, such that what is cut costs less together: |sum of gradients|^2 of a row.

    gradient [rows, units]. Greedy, one pass over the units in the order of their own cost: each is
    cut in the place of the one whose return helps most, if that helps.
    Source: Kwon et al. (arXiv 2204.09656), there without the Gram matrix.
    """
    gram = (gradient.T @ gradient / len(gradient)).double()
    own = gram.diagonal()
    cut = torch.ones(len(own), dtype=torch.bool)
    cut[kept] = False
    if not cut.any() or cut.all():
        return kept
    shared = gram[:, cut].sum(1)
    for unit in own.argsort(stable=True).tolist():
        if cut[unit]:
            continue
        shared += gram[:, unit]
        cut[unit] = True
        gain = (2 * shared - own).masked_fill(~cut, -torch.inf)
        back = int(gain.argmax())
        cut[back] = False
        shared -= gram[:, back]
    return (~cut).nonzero()[:, 0]
