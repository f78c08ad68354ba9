"""Sums over tokens that tell how well any linear layer reads x as y."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over rows of x [n, inputs] and y [n, outputs] and their products, float64; rows may
    have weights, whose mean is 1.

    No matrix of rows is kept: a Gram matrix of the inputs answers all that is asked.
    """

    rows: int = 0
    x: Tensor = field(default_factory=lambda: torch.zeros(()))
    y: Tensor = field(default_factory=lambda: torch.zeros(()))
    xx: Tensor = field(default_factory=lambda: torch.zeros(()))
    xy: Tensor = field(default_factory=lambda: torch.zeros(()))
    yy: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        x, y = x.float(), y.float()
        own = x if weight is None else x * weight[:, None]
        self.rows += len(x)
        self.x = self.x + own.sum(0).double()
        self.y = self.y + (y if weight is None else y * weight[:, None]).sum(0).double()
        self.xx = self.xx + (own.T @ x).double()
        self.xy = self.xy + (own.T @ y).double()
        squares = y.square().sum(-1)
        self.yy = self.yy + (squares if weight is None else squares * weight).sum().double()

    def __add__(self, other: Moments) -> Moments:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Moments(*(a + b for a, b in pairs))

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Mean of |x weight' + bias - y|^2, weight [outputs, inputs]."""
        w = weight.double()
        b = w.new_zeros(len(w)) if bias is None else bias.double()
        total = self.yy + ((w @ self.xx) * w).sum() - 2 * (w.T * self.xy).sum()
        total += 2 * b @ (w @ self.x) - 2 * b @ self.y + self.rows * b @ b
        return float(total) / max(self.rows, 1)


def ridge(gram: Tensor, right: Tensor, strength: float) -> Tensor:
    """Solve (gram + strength * mean of its diagonal) z = right; gram [k, k], right [k, ...]."""
    level = strength * gram.diagonal().mean().clamp(min=1e-12)
    shifted = gram + level * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if int(failed):
        raise ArithmeticError("the least squares have no unique solution")
    flat = right if right.dim() > 1 else right[:, None]
    return torch.cholesky_solve(flat, factor).reshape(right.shape)
