"""Weights rounded to the nearest codes."""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.kernels.linear.formats import ROWS, Format, pack, values
from regraft.program import RegraftError

PIECE = 64 * ROWS


def round_to_nearest(weight: Tensor, format: Format) -> tuple[Tensor, float]:
    """Packed weights of weight [rows, columns] and the error's share of their norm.

    A group's scale is its largest magnitude over 127; with zeros, its range over 2**bits - 1.
    RegraftError where weights are no finite numbers or groups do not divide.
    """
    format.padded(weight.shape[1])
    made, error, norm = [], 0.0, 0.0
    for part in weight.detach().split(PIECE):
        part = part.float()
        if not part.isfinite().all():
            raise RegraftError("it holds weights that are no finite numbers")
        codes, parts = _rounded(part.unflatten(1, (format.groups(part.shape[1]), -1)), format)
        made.append(pack(format, codes, **parts))
        error += float((values(format, codes, parts) - part).double().square().sum())
        norm += float(part.double().square().sum())
    return torch.cat(made), (error / norm) ** 0.5 if norm else 0.0


def rounded(weight: Tensor, format: Format) -> Tensor:
    """What weights [rows, columns] become when they are rounded, float32; errors as above."""
    groups = weight.float().unflatten(1, (format.groups(weight.shape[1]), -1))
    return values(format, *_rounded(groups, format))


def _rounded(x: Tensor, format: Format) -> tuple[Tensor, dict[str, Tensor]]:
    top = 2**format.bits - 1
    if format.zero:
        low, high = x.aminmax(dim=2)
        parts = {"zero": low.half()}
        parts["scale"] = ((high - parts["zero"].float()) / top).half()
        x = x - parts["zero"].float().unsqueeze(2)
        start = 0
    else:
        parts, start = {"scale": (x.abs().amax(2) / (top // 2)).half()}, format.middle
    if not all(part.isfinite().all() for part in parts.values()):
        raise RegraftError("it holds weights beyond the range of float16 scales")
    scale = parts["scale"].float().unsqueeze(2)
    inverse = torch.where(scale > 0, 1 / scale, 0)
    codes = (x * inverse).round().add_(start).clamp_(0 if format.zero else 1, top)
    return codes.to(torch.uint8).flatten(1), parts
