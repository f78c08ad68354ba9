"""Where a compiled model lives."""

from __future__ import annotations

from typing import Any

import torch

from regraft.program import RegraftError


def check_placement(compiled: Any, *args: Any, **kwargs: Any) -> None:
    """RegraftError when ``to(*args, **kwargs)`` asks for another device or dtype than it has."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    here = compiled.device
    moved = device is not None and (
        device.type != here.type or device.index not in (None, here.index)
    )
    if moved or dtype not in (None, compiled.dtype):
        raise RegraftError(
            f"the model was compiled for {here} and {compiled.dtype}: move the original and "
            "compile it again"
        )
