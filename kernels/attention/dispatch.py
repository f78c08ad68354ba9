"""Attention to a dense cache by the kernel of its device, else by the reference."""

from __future__ import annotations

from torch import Tensor

from regraft.kernels.attention import cuda
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
    if kernels and wanted() and (causal or mask is not None) and cuda.fits(q, k, v, mask, sinks):
        length = k.shape[2] if position is None else q.shape[2]
        try:
            return cuda.attend(q, k, v, length, position, mask, window, sinks, scale, softcap)
        except KernelError as error:
            tell("attention runs by torch", error)
    return attention(q, k, v, mask, scale, softcap, sinks, causal, window)
