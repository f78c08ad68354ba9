"""Quantising whole blocks of keys and values on CUDA: channels in turn by a kernel, the rest by
the reference."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from regraft.kernels import launch
from regraft.kernels.compiled import KernelError, kernel
from regraft.kernels.kvquant import reference
from regraft.kernels.kvquant.cuda.plan import Turns
from regraft.kernels.kvquant.feedback import Feedback
from regraft.kernels.kvquant.layout import BLOCK
from regraft.kernels.kvquant.reference import Levels, Packed


def quantize(
    kind: str,
    x: Tensor,
    book: Levels,
    bits: int,
    share: float,
    layout: str,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    feedback: Feedback | None = None,
) -> Packed:
    """The reference's ``quantize``, bit for bit.

    Raises KernelError for feedback with bits not in 2, 3, 4 or with heads of an odd size or one
    over 256, where a block of threads has too little shared memory, and where nothing can be
    compiled.
    """
    if feedback is not None:
        feedback = OnGpu(feedback.matrix, feedback.weight)
    return reference.quantize(kind, x, book, bits, share, layout, scale, zero, feedback)


class OnGpu(Feedback):
    """Feedback whose channels are coded by the kernel."""

    def in_turn(
        self, y: Tensor, midpoints: Tensor, levels: Tensor, exact: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch, heads, length, size = y.shape
        function = _kernel(y.device, size, len(levels), exact is not None)
        if length % BLOCK:
            raise KernelError(f"no CUDA kernel codes {length} tokens in turn")
        y, codes = y.contiguous(), torch.empty(y.shape, dtype=torch.uint8, device=y.device)
        aims = torch.empty_like(y)
        if y.numel():
            kept = codes if exact is None else exact.contiguous().view(torch.uint8)
            given = (y, self.matrix.contiguous(), midpoints, levels, kept, codes, aims)
            function(*(x.view(-1) for x in given), batch, heads, length // BLOCK)
        return codes, aims


@cache
def _kernel(device: torch.device, size: int, levels: int, exact: bool) -> Any:
    properties = torch.cuda.get_device_properties(device)
    case = Turns(size, levels, exact)
    if (
        size % 2 or size > 256 or levels not in (4, 8, 16)
        or case.bytes > properties.shared_memory_per_block_optin
    ):  # fmt: skip
        raise KernelError(f"no CUDA kernel codes heads of {size} with {levels} levels in turn")

    def make() -> Any:
        from regraft.kernels.kvquant.cuda.turns import build

        return build(case)

    return kernel("kvquant_turns", make, launch.target(device), case)
