"""Attention to a dense cache by the kernel of its device, else by the reference."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from regraft.kernels.attention import cuda, llvm
from regraft.kernels.attention.reference import attention
from regraft.kernels.compiled import KernelError, tell, wanted


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    causal: bool = True,
    window: int = 0,
    position: Tensor | None = None,
    kernels: bool = True,
) -> Tensor:
    """The reference's ``attention`` by a TVM kernel where there is one, with one notice where it
    cannot be made. REGRAFT_TVM=0 asks for the reference.

    position int64 [1]: the queries are those from there on, and k and v buffers with room after
    them, which mask hides. kernels: False asks for the reference too.
    """
    if kernels and wanted() and (causal or mask is not None):
        try:
            if cuda.fits(q, k, v, mask, sinks):
                length = k.shape[2] if position is None else q.shape[2]
                return cuda.attend(q, k, v, length, position, mask, window, sinks, scale, softcap)
            if position is None and not softcap and llvm.fits(q, k, v, sinks):
                first = _first(q, k, mask, window)
                if first is not None:
                    column = _none(q.shape[1]) if sinks is None else sinks.float().contiguous()
                    scale_ = q.shape[-1] ** -0.5 if scale is None else scale
                    return llvm.attend(q, k, v, first, column, scale_)
        except KernelError as error:
            tell("attention runs by torch", error)
    return attention(q, k, v, mask, scale, softcap, sinks, causal, window)


def _first(q: Tensor, k: Tensor, mask: Tensor | None, window: int) -> Tensor | None:
    """The first key that each query sees, int32 [B, S], where it sees all from there to itself."""
    batch, rows, length = q.shape[0], q.shape[2], k.shape[2]
    if mask is None and not window:
        return _zeros(batch, rows)
    own = torch.arange(length - rows, length)
    first = torch.zeros(batch, rows, dtype=torch.int64)
    if mask is not None:
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:] != (1, rows, length):
            return None
        seen = mask[:, 0].expand(batch, -1, -1)
        first = seen.int().argmax(-1)
        key = torch.arange(length)
        if not torch.equal(seen, (key >= first.unsqueeze(-1)) & (key <= own.unsqueeze(-1))):
            return None
    return (torch.maximum(first, own - window + 1) if window else first).int()


@lru_cache(64)
def _zeros(batch: int, rows: int) -> Tensor:
    return torch.zeros(batch, rows, dtype=torch.int32)


@lru_cache(64)
def _none(heads: int) -> Tensor:
    return torch.full((heads,), float("-inf"))
