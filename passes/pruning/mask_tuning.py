"""Masks of the heads and filters kept that reproduce a layer's output best."""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.passes.pruning.moments import Moments, ridge


def tuned(
    moments: Moments, weight: Tensor, bias: Tensor | None, width: int, strength: float
) -> Tensor:
    """A scale for each ``width`` columns of weight [outputs, inputs]: [inputs / width].

    Least squares on Gram matrices, drawn to 1 by ``strength``: with columns h_i of x and w_i of
    weight, the normal matrix of filters is (x'x) * (w'w) element by element.
    Source: Kwon et al. (arXiv 2204.09656), there with LSMR and a damping that depends on the data.
    """
    w = weight.double()
    aimed = moments.xy if bias is None else moments.xy - moments.x[:, None] * bias.double()
    gram, right = moments.xx * (w.T @ w), (aimed * w.T).sum(1)
    if width > 1:
        parts = len(right) // width
        gram = gram.view(parts, width, parts, width).sum((1, 3))
        right = right.view(parts, width).sum(1)
    ones = torch.ones_like(right)
    return (ones + ridge(gram, right - gram @ ones, strength)).float()
