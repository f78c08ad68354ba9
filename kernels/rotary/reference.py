"""Rotary position embedding on a slice of the head channels."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, offset: int = 0
) -> Tensor:
    """Rotate channels offset..offset+r of x [B, H, S, D] by cos, sin [B or 1, S, r/2].

    Half style pairs channels (i, i + r/2); interleaved style pairs (2i, 2i + 1).
    """
    half = cos.shape[-1]
    end = offset + 2 * half
    if end > x.shape[-1]:
        raise ValueError(f"rotation needs {end} channels, the head has {x.shape[-1]}")
    cos, sin = cos.unsqueeze(1).to(x.dtype), sin.unsqueeze(1).to(x.dtype)
    part = x[..., offset:end]
    if interleaved:
        a, b = part[..., 0::2], part[..., 1::2]
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = part[..., :half], part[..., half:]
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    if end - offset == x.shape[-1]:
        return rotated
    return torch.cat((x[..., :offset], rotated, x[..., end:]), -1)
