"""The weights of the columns kept, fitted anew to a layer's output."""

from __future__ import annotations

from torch import Tensor

from regraft.passes.pruning.moments import Moments, ridge


def refitted(moments: Moments, weight: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Weight [outputs, inputs] and bias [outputs] of least squares, drawn to ``weight`` by
    ``strength``; the bias makes up for the mean of what was cut."""
    w, rows = weight.double(), moments.rows
    gram = moments.xx - moments.x[:, None] * moments.x / rows
    right = moments.xy - moments.x[:, None] * moments.y / rows
    made = w + ridge(gram, right - gram @ w.T, strength).T
    bias = (moments.y - made @ moments.x) / rows
    return made.float(), bias.float()
