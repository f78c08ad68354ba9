"""What operators that own a cache know of the step that is being captured."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Decoding:
    """The step of a language model: nonzero where a token is one [batch, total], positions
    [batch, length], past keys and values."""

    mask: Tensor
    positions: Tensor
    past: tuple[Tensor, ...]


decoding: ContextVar[Decoding | None] = ContextVar("decoding", default=None)
