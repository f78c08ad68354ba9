"""Error feedback: channels are coded in turn, each to make up for the errors of those before it.

What an error of a head's keys or values costs is a quadratic form: errors of channels that a model
reads together cancel or add up. Rounding each channel alone minimises its diagonal; feedback the
whole, with the same codes and bytes. Source: GPTQ (Frantar et al., 2022, arXiv 2210.17323), here
for the vectors of a cache in place of the rows of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

DAMPING = 0.01


@dataclass(frozen=True, eq=False)
class Feedback:
    """matrix: float32 [H, D, D], what the error of the i-th channel coded adds to the target of
    the j-th, 0 for j <= i. weight: float16 [1, H, 1, D], what an error of a channel that later
    ones make up for costs, relative to the largest; above 0."""

    matrix: Tensor
    weight: Tensor

    def to(self, device: torch.device) -> Feedback:
        return Feedback(self.matrix.to(device), self.weight.to(device))

    def in_turn(
        self, y: Tensor, midpoints: Tensor, levels: Tensor, exact: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Codes (uint8) of normalised y [B, H, T, D], and what they stand for, float32.

        midpoints [L - 1] and levels [L] are float32; those that are exact (bool, as y) have no
        error.
        """
        order = turns(y.shape[-1]).to(y.device)
        y = y[..., order].permute(3, 0, 1, 2).contiguous()
        steps = self.matrix.permute(1, 2, 0)[:, :, None, :, None]
        aim, codes = y.clone(), torch.empty_like(y, dtype=torch.uint8)
        kept = None if exact is None else exact[..., order].permute(3, 0, 1, 2)
        for i in range(len(y)):
            code = torch.bucketize(aim[i], midpoints)
            read = levels[code]
            codes[i] = code
            error = y[i] - (read if kept is None else torch.where(kept[i], aim[i], read))
            aim[i + 1 :] += error * steps[i, i + 1 :]
        back = order.argsort()
        return codes[back].permute(1, 2, 3, 0), aim[back].permute(1, 2, 3, 0)


@cache
def turns(size: int) -> Tensor:
    """The channels of a head, int64 [D], as they are coded: the pairs that turn slowest first.

    Those matter most in rotated keys, and the earlier a channel is, the more others make up for
    it. Pairs are D/2 apart.
    """
    slow = torch.arange(size // 2 - 1, -1, -1)
    return torch.stack((slow + size // 2, slow), 1).flatten()


def feedback(fisher: Tensor, scale: Tensor | None = None) -> Feedback:
    """Of what errors cost, [H, D, D] positive semidefinite, and the scales [1, H, 1, D] of codes.

    The matrix is of errors in units of the scale, the weight of errors as they are. Channels of
    scale 0 are left out of the turns.
    """
    order = turns(fisher.shape[-1]).to(fisher.device)
    form = fisher.double()
    scales = torch.ones_like(form[:, 0]) if scale is None else scale[0, :, 0].double()
    form = form * scales.unsqueeze(1) * scales.unsqueeze(2)
    diagonal = form.diagonal(dim1=1, dim2=2)
    damping = DAMPING * diagonal.mean(1, keepdim=True).clamp(min=1e-30) + 1e-30
    form = form + torch.diag_embed(damping.expand_as(diagonal))
    last_first = order.flip(0)
    factor = torch.linalg.cholesky(form[:, last_first][:, :, last_first]).flip(1, 2)
    own = factor.diagonal(dim1=1, dim2=2)
    matrix = (factor / own.unsqueeze(1)).triu(1)
    weight = torch.empty_like(own)
    weight[:, order] = own
    alone = fisher.double().diagonal(dim1=1, dim2=2).sqrt()
    weight = torch.where(scales > 0, weight / scales.clamp(min=1e-30), alone)
    weight = (weight / weight.amax().clamp(min=1e-30)).clamp(min=2.0**-14)
    return Feedback(matrix.float(), weight.half()[None, :, None])
