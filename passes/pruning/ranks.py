"""Units in the order of what they count for, so that each group loses as many."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from regraft.passes.pruning.blocks import Block


class Ranks:
    """A block's units by their rank within their group: rank r stands for the units that have it,
    one of each group. A block of one group has its units in another order.

    importance: [units]. block: what remains of the block for a search over ranks.
    """

    def __init__(self, block: Block, importance: Tensor) -> None:
        size = block.units // block.groups
        order = importance.double().view(block.groups, size).argsort(dim=-1, stable=True)
        self._order = order + size * torch.arange(block.groups)[:, None]
        self.block = replace(block, units=size, groups=1)

    def sums(self, values: Tensor) -> Tensor:
        """Values of units [..., units] as those of ranks [..., ranks]."""
        return values[..., self._order].sum(-2)

    def units(self, ranks: Tensor) -> Tensor:
        """The units of these ranks, ascending."""
        return self._order[:, ranks].flatten().sort().values
