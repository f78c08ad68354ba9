"""Quantized caches on CUDA, attention to them and coding, by kernels that TVM generates.

Raises KernelError where there is no kernel: the reference can take its place.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from regraft.kernels import launch
from regraft.kernels.compiled import KernelError, kernel
from regraft.kernels.kvquant.cuda.plan import Case, Layout
from regraft.kernels.kvquant.cuda.quantizing import quantize
from regraft.kernels.kvquant.layout import BLOCK
from regraft.kernels.kvquant.reference import Body

__all__ = ["KernelError", "attend", "quantize"]
SIZES = (64, 80, 96, 128, 256)
PROLOGUE = 4
"""Turns that the start and the end of a block of threads cost as much as."""


def attend(
    q: Tensor,
    body: Body,
    exact_key: Tensor,
    exact_value: Tensor,
    exact_mask: Tensor,
    first: Tensor,
    sinks: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """The reference's ``attend``, with an error of about 1e-3 of the output's norm.

    Runs on the current stream and waits for nothing. Raises KernelError for queries of other types
    than float16 and bfloat16 or than the exact tokens', for head sizes not in SIZES, bits not in
    2, 3, 4, other layouts, GPUs before Ampere, and where nothing can be compiled.
    """
    batch, query_heads, queries, size = q.shape
    key, value = body.key, body.value
    heads, exact = exact_key.shape[1:3]
    if exact_key.dtype != q.dtype or exact_value.dtype != q.dtype:
        raise KernelError(f"queries of {q.dtype} and exact tokens of {exact_key.dtype}")
    function, layout = _kernel(
        q.device,
        q.dtype,
        heads,
        query_heads // heads,
        queries,
        (size, value.size),
        (key.bits, value.bits),
        (key.outliers is not None, value.outliers is not None),
        body.table is not None,
        softcap > 0,
        (key.layout, value.layout),
    )
    splits = _splits(layout, q.device, batch, body.blocks, exact)
    parts = layout.parts(splits, exact)
    lines = batch * heads * parts * layout.case.rows
    partial = q.new_empty(lines * (value.size + 2), dtype=torch.float32)
    out = q.new_empty(batch, query_heads, queries, value.size)
    none = _none(q.device)
    table = none.half() if body.table is None else body.table
    exact_capacity = exact_key.stride(int(heads > 1)) // size
    function(
        *(launch.flat(x) for x in (
            *(q, key.codes, value.codes, key.levels, value.levels),
            *(key.scale, key.zero, value.scale, value.zero),
            *(none if x is None else x for part in (key, value)
              for x in (part.outliers, part.offsets)),
            *(table, exact_key, exact_value, exact_mask, first, sinks),
        )),
        *partial.split([lines * value.size, lines, lines]),
        out.view(-1),
        *(batch, splits, body.blocks, key.codes.shape[2]),
        table.stride(0) // (BLOCK * size) if table.dim() > 1 else 0,
        *(exact, exact_capacity, int(key.scale.shape[0] > 1), key.scale.shape[2]),
        *(body.group // BLOCK, int(table.shape[0] > 1)),
        *(0 if x is None else x.shape[2] for x in (key.outliers, value.outliers)),
        *(key.unit, value.unit, scale, softcap),
    )  # fmt: skip
    return out


@cache
def _none(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def _splits(layout: Layout, device: torch.device, batch: int, blocks: int, exact: int) -> int:
    """Into how many ranges of blocks the body is split: what takes the fewest rounds of turns."""
    turns = -(-blocks // layout.blocks)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    more = bool(exact) / 4
    return launch.splits(turns, batch * layout.places, processors, PROLOGUE, more)


@cache
def _kernel(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    groups: int,
    queries: int,
    sizes: tuple[int, int],
    bits: tuple[int, int],
    outliers: tuple[bool, bool],
    rotated: bool,
    softcap: bool,
    layouts: tuple[str, str],
) -> tuple[Any, Layout]:
    properties = torch.cuda.get_device_properties(device)
    if not (
        set(sizes) <= set(SIZES) and set(bits) <= {2, 3, 4} and set(layouts) == {"cuda"}
        and dtype in (torch.float16, torch.bfloat16) and properties.major >= 8
    ):  # fmt: skip
        raise KernelError(f"no CUDA kernel for {dtype}, heads of {sizes}, {bits} bits, {layouts}")
    case = Case(
        str(dtype).removeprefix("torch."),
        *(heads, groups, queries, *sizes, *bits, *outliers, rotated, softcap),
        properties.shared_memory_per_block_optin,
    )

    def make() -> Any:
        from regraft.kernels.kvquant.cuda.generate import build

        return build(case)

    return kernel("kvquant_attend", make, launch.target(device), case), Layout(case)
