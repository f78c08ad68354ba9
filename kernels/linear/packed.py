"""Packed linear layers by the kernels of their device, else by dequantised tiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.kernels.compiled import KernelError, tell, wanted
from regraft.kernels.linear import cuda, llvm
from regraft.kernels.linear.formats import HALVES, ROWS, check, dequantize, parse, unpack, values
from regraft.program import RegraftError

FEW, TILES = 16, 64
"""Rows up to which kernels read the codes themselves; tiles that are dequantised at once."""
MANY = {"cpu": FEW, "cuda": 512}
"""The same by device: on CUDA codes are read again for each FEW rows, still sooner done."""
NOTICE = "packed linear layers run by reference, slower"
_rounded = ContextVar("rounded", default=True)


@contextmanager
def unrounded() -> Iterator[None]:
    """Let activations meet packed weights as they are."""
    token = _rounded.set(False)
    try:
        with llvm.direct.paused():
            yield
    finally:
        _rounded.reset(token)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, format: str, rows: int) -> Tensor:
    """x [..., columns] times packed weights [rows, columns] transposed, plus bias [rows].

    Few rows of x by a TVM kernel, which on CPUs rounds them to 15 bits by blocks; more, and where
    there is no kernel (with one notice), by torch on tiles of dequantised weights. REGRAFT_TVM=0
    asks for that.
    """
    columns = x.shape[-1]
    check(packed, format, rows, columns)
    if bias is not None and tuple(bias.shape) != (rows,):
        raise RegraftError(f"bias of {list(bias.shape)} for {rows} channels")
    for name, other in (("packed weights", packed), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise RegraftError(f"{name} are on {other.device}, activations on {x.device}")
    flat = x.reshape(-1, columns)
    out = None
    if wanted() and _rounded.get() and 0 < flat.shape[0] <= _most(x.device, format):
        try:
            out = _by_kernel(flat, packed, bias, format, rows)
        except KernelError as error:
            tell(NOTICE, error)
    if out is None:
        out = _by_tiles(flat, packed, format, rows)
        out = out if bias is None else out.add_(bias)
    return out.view(*x.shape[:-1], rows).to(x.dtype)


def _most(device: torch.device, format: str) -> int:
    """Rows that kernels take."""
    return FEW if format in HALVES else MANY.get(device.type, 0)


def _by_kernel(
    x: Tensor, packed: Tensor, bias: Tensor | None, format: str, rows: int
) -> Tensor | None:
    if x.is_cuda:
        return cuda.linear(x, packed, bias, format, rows)
    if x.device.type != "cpu":
        return None
    added = None if bias is None else bias.float().contiguous()
    return llvm.linear(x.float(), packed, added, format, rows)


def prepare(kinds: Iterable[tuple[str, bool]]) -> None:
    """Make the kernels of (format, whether there is a bias), where they can be made."""
    for format, bias in kinds:
        if wanted():
            try:
                llvm.prepare(format, bias)
            except KernelError as error:
                tell(NOTICE, error)


def reference(x: Tensor, packed: Tensor, bias: Tensor | None, format: str, rows: int) -> Tensor:
    """What ``linear`` computes, rounding aside; autograd can follow it."""
    weight = dequantize(packed, format, rows, x.shape[-1]).to(x.dtype)
    return F.linear(x, weight, bias)


def embedding(ids: Tensor, packed: Tensor, format: str, rows: int, columns: int) -> Tensor:
    """Rows of packed weights [rows, columns] by ids [...]: float32 [..., columns]."""
    check(packed, format, rows, columns)
    flat = ids.reshape(-1)
    known = flat.numel() and flat.device.type == "cpu"  # on CUDA, torch looks when it indexes
    if known and not (0 <= int(flat.min()) and int(flat.max()) < rows):
        raise RegraftError(f"token ids lie outside the {rows} rows of the embedding")
    if format in HALVES:
        found = packed[flat].float()
    else:
        kind = parse(format)
        picked = torch.empty(flat.numel(), columns, device=packed.device)
        for start in range(0, flat.numel(), FEW):
            part = flat[start : start + FEW]
            codes, parts = unpack(packed[part // ROWS], kind, columns)
            own = torch.arange(part.numel(), device=part.device) * ROWS + part % ROWS
            picked[start : start + FEW] = values(
                kind, codes[own], {name: x[own] for name, x in parts.items()}
            )
        found = picked
    return found.view(*ids.shape, columns)


def _by_tiles(x: Tensor, packed: Tensor, format: str, rows: int) -> Tensor:
    if format in HALVES:
        if x.dtype == packed.dtype and x.is_cuda:
            return F.linear(x, packed)
        return torch.cat([x.float() @ part.float().t() for part in packed.split(TILES * ROWS)], 1)
    x, columns = x.float(), x.shape[1]
    out = x.new_empty(x.shape[0], rows)
    for start in range(0, packed.shape[0], TILES):
        stop = min(start + TILES, packed.shape[0])
        width = min(rows, stop * ROWS) - start * ROWS
        weight = _transposed(packed, format, columns, range(start, stop))[:, :width]
        out[:, start * ROWS : start * ROWS + width] = x @ weight
    return out


def _transposed(packed: Tensor, format: str, columns: int, tiles: range) -> Tensor:
    """Tiles of weights as float32 [columns, channels]."""
    if packed.device.type == "cpu" and wanted():
        try:
            return llvm.unpacked(packed, format, columns, tiles)
        except KernelError as error:
            tell(NOTICE, error)
    part = packed[tiles.start : tiles.stop]
    return dequantize(part, format, len(tiles) * ROWS, columns).t()
