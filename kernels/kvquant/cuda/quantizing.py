"""Quantising whole blocks of keys and values on CUDA: a kernel each for ranges and outliers,
channels in turn, and packing."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from regraft.kernels import launch
from regraft.kernels.compiled import KernelError, kernel
from regraft.kernels.kvquant.cuda.plan import Coded, Turns
from regraft.kernels.kvquant.feedback import Feedback
from regraft.kernels.kvquant.layout import BLOCK, PLANES, order
from regraft.kernels.kvquant.reference import Levels, Packed, cap

SHARED = 48 * 1024


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
    """The reference's ``quantize``, bit for bit; of equal candidates the first are outliers.

    Runs on the current stream and waits for nothing. Raises KernelError for bits not in 2, 3, 4,
    layouts other than "cuda", heads whose size is no multiple of 16 or over 256, and where nothing
    can be compiled or a block of threads has too little shared memory.
    """
    batch, heads, length, size = x.shape
    case = Coded(kind, heads, size, bits, cap(share, heads * size), feedback is not None)
    ranging, packing = _kernels(x.device, case, layout)
    blocks = length // BLOCK
    x = x.float().contiguous()
    y, aims = torch.empty_like(x), torch.empty_like(x)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    exact = torch.empty_like(codes) if case.count else codes
    rows = groups = 1
    if scale is None or zero is None:
        scale, zero = (x.new_empty(batch, length, dtype=torch.float16) for _ in range(2))
    else:
        scale, zero = scale.contiguous(), zero.contiguous()
        rows, groups = scale.shape[0], scale.shape[2]
    levels = book.levels.float() * book.unit
    packed = codes.new_empty(batch, heads, blocks, BLOCK * size * bits // 8)
    entries = offsets = None
    if case.count:
        entries = torch.zeros(batch, blocks, BLOCK * case.count, dtype=torch.int32, device=x.device)
        offsets = entries.new_empty(batch, blocks, heads + 1)
    if x.numel():
        sizes = batch, blocks, rows, groups
        weight = scale if feedback is None else feedback.weight.contiguous()
        steps = (x, scale, zero, book.midpoints, levels, weight, y, aims, exact)
        ranging(*(part.view(-1) for part in steps), *sizes)
        if feedback is not None:
            kept = exact if case.count else None
            code_in_turn(feedback.matrix, y, book.midpoints, levels, kept, codes, aims)
        own = (x, y, codes, aims, exact, scale, zero, book.midpoints, levels)
        made = (_order(kind, bits, size, x.device), packed, *(
            codes.view(torch.int32) if part is None else part for part in (entries, offsets)
        ))  # fmt: skip
        packing(*(part.view(-1) for part in (*own, *made)), *sizes)
    if kind == "value":
        scale, zero = (part.unflatten(1, (-1, BLOCK)) for part in (scale, zero))
    return Packed(
        kind, bits, size, layout, packed, scale, zero, book.levels, book.unit, entries, offsets
    )


def code_in_turn(
    matrix: Tensor,
    y: Tensor,
    midpoints: Tensor,
    levels: Tensor,
    exact: Tensor | None,
    codes: Tensor,
    aims: Tensor,
) -> None:
    """``Feedback.in_turn`` of y [B, H, 32 * n, D], contiguous; exact, uint8, may be None.

    Writes codes (uint8) and aims (float32).
    """
    batch, heads, length, size = y.shape
    function = _in_turn(y.device, Turns(size, len(levels), exact is not None))
    kept = codes if exact is None else exact
    given = (y, matrix.contiguous(), midpoints, levels, kept, codes, aims)
    function(*(part.view(-1) for part in given), batch, heads, length // BLOCK)


@cache
def _in_turn(device: torch.device, case: Turns) -> Any:
    properties = torch.cuda.get_device_properties(device)
    if (
        case.size % 2 or case.size > 256 or case.levels not in (4, 8, 16)
        or case.bytes > properties.shared_memory_per_block_optin
    ):  # fmt: skip
        raise KernelError(
            f"no CUDA kernel codes heads of {case.size} with {case.levels} levels in turn"
        )

    def make() -> Any:
        from regraft.kernels.kvquant.cuda.turns import build

        return build(case)

    return kernel("kvquant_turns", make, launch.target(device), case)


@cache
def _kernels(device: torch.device, case: Coded, layout: str) -> tuple[Any, Any]:
    """Those of ranges and of packing."""
    if (
        case.bits not in (2, 3, 4) or layout != "cuda" or case.size % 16 or case.size > 256
        or 4 * case.channels > SHARED
    ):  # fmt: skip
        raise KernelError(
            f"no CUDA kernel codes {case.heads} heads of {case.size} in {case.bits} bits "
            f"({2**case.bits} levels) for {layout}"
        )

    def ranging() -> Any:
        from regraft.kernels.kvquant.cuda.ranging import build

        return build(case)

    def packing() -> Any:
        from regraft.kernels.kvquant.cuda.packing import build

        return build(case)

    target = launch.target(device)
    return (
        kernel("kvquant_ranges", ranging, target, case),
        kernel("kvquant_pack", packing, target, case),
    )


@cache
def _order(kind: str, bits: int, size: int, device: torch.device) -> Tensor:
    """Which number lies in each place of each plane, int32."""
    return torch.cat([order(kind, w, size, "cuda", device).int() for w in PLANES[bits]])
