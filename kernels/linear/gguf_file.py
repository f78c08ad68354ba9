"""The tensors of a GGUF file, read where they lie and never beyond the file's end."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGUFValueType
from torch import Tensor

from regraft.kernels.linear.formats import HALVES, ROWS, dequantize, parse
from regraft.kernels.linear.gguf import BLOCKS, BYTES, columns, tiles
from regraft.program import RegraftError

PIECE = 64 * ROWS
"""Rows that are read at once."""
_HALVES = {"F16": "float16", "BF16": "bfloat16"}


class _Reader(gguf.GGUFReader):
    """Checks every length against the file's, and skips lists: vocabularies are long."""

    def _get(
        self, offset: int, dtype: Any, count: int = 1, override_order: Any = None
    ) -> np.ndarray:
        if count < 0 or offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, within something")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = GGUFValueType(self._get(orig_offs, np.uint32)[0])
        count, at = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
        if kind == GGUFValueType.STRING:
            view, end = np.asarray(self.data).data, len(self.data)
            for _ in range(count):
                if at + 8 > end:
                    raise ValueError(f"it ends at byte {end}, within a list")
                at += 8 + int.from_bytes(view[at : at + 8], "little")
        elif kind in self.gguf_scalar_to_np:
            size = np.dtype(self.gguf_scalar_to_np[kind]).itemsize * count
            self._get(at, np.uint8, size)
            at += size
        else:
            raise ValueError(f"a list of {kind.name}")
        return at - orig_offs, [], [], [GGUFValueType.ARRAY]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file; order: which of its rows is each row of the weights."""

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int
    order: Tensor | None = None

    @property
    def format(self) -> str | None:
        """The format in which weights [rows, columns] stay packed, if they can."""
        if len(self.shape) != 2:
            return None
        return BLOCKS[self.kind].name if self.kind in BLOCKS else _HALVES.get(self.kind)

    def ordered(self, order: Tensor | None) -> GgufTensor:
        return replace(self, order=order)

    def packed(self) -> Tensor:
        """The weights in ``format``; RegraftError where a scale is no finite number."""
        return packed_together([self])[0]

    def _pack(self, out: Tensor) -> None:
        rows = self.shape[0]
        if self.kind in _HALVES:
            out.copy_(self._rows(0, rows).view(out.dtype))
            if not out.isfinite().all():
                raise RegraftError(f"{self.name} holds weights that are no finite numbers")
            return
        for start in range(0, rows, PIECE):
            made = tiles(self.kind, self._rows(start, min(start + PIECE, rows)), self.name)
            out[start // ROWS : start // ROWS + made.shape[0]] = made

    def dense(self) -> Tensor:
        """Float32, in the file's order of rows."""
        if self.format and self.kind in BLOCKS:
            return dequantize(self.ordered(None).packed(), self.format, *self.shape)
        kind = gguf.GGMLQuantizationType[self.kind]
        raw = self._read(0, self.size)
        if self.kind == "F32":
            values = raw.view(np.float32)
        else:
            try:
                values = gguf.dequantize(raw.reshape(self._bytes), kind)
            except NotImplementedError as error:
                raise RegraftError(f"{self.path}: {self.name}: {error}") from error
        return torch.from_numpy(np.array(values, np.float32)).view(self.shape)

    @cached_property
    def _bytes(self) -> tuple[int, ...]:
        kind = gguf.GGMLQuantizationType[self.kind]
        return gguf.quant_shape_to_byte_shape(self.shape, kind)

    def _rows(self, start: int, stop: int) -> Tensor:
        """uint8 [rows, bytes]"""
        wide = self._bytes[1]
        if self.order is None:
            raw = self._read(start * wide, (stop - start) * wide)
            return torch.from_numpy(raw).view(stop - start, wide)
        whole = torch.from_numpy(self._read(0, self.size)).view(self.shape[0], wide)
        return whole[self.order[start:stop]]

    def _read(self, start: int, size: int) -> np.ndarray:
        raw = np.fromfile(self.path, np.uint8, size, offset=self.offset + start)
        if raw.size != size:
            raise RegraftError(f"{self.path} ended while {self.name} was read")
        return raw


def packed_together(tensors: Sequence[GgufTensor]) -> tuple[Tensor, list[Tensor]]:
    """The packed weights of tensors of one format and width, one after the other; and of each."""
    name, width = str(tensors[0].format), tensors[0].shape[1]
    if name in HALVES:
        counts, dtype = [tensor.shape[0] for tensor in tensors], HALVES[name]
    else:
        counts, dtype = [-(-tensor.shape[0] // ROWS) for tensor in tensors], torch.uint8
        width = parse(name).tile_bytes(width)
    whole = torch.empty(sum(counts), width, dtype=dtype)
    parts = list(whole.split(counts))
    for tensor, part in zip(tensors, parts, strict=True):
        tensor._pack(part)
    return whole, parts


class GgufFile:
    """architecture, what names its configuration, and the tensors by name.

    RegraftError where the file is no GGUF, of an unknown version or type, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = _Reader(path)
            if reader.byte_order != "I":
                raise ValueError("its byte order is another than this machine's")
            start = int(reader.data_offset)
            self.tensors = {t.name: _tensor(path, t, start) for t in reader.tensors}
            self.architecture = str(reader.fields["general.architecture"].contents())
            head = reader.data[: reader.data_offset].tobytes()
        except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
            raise RegraftError(f"{path} is no sound GGUF file: {error}") from error
        self.digest = hashlib.sha256(head).hexdigest()[:32]


def _tensor(path: Path, found: Any, start: int) -> GgufTensor:
    kind, shape = found.tensor_type.name, tuple(int(n) for n in reversed(found.shape.tolist()))
    size = int(found.n_bytes)
    if not all(shape):
        raise ValueError(f"{found.name} is empty")
    if int(found.field.parts[-1][0]) + start != int(found.data_offset):
        raise ValueError(f"{found.name} lies nowhere")
    if kind in BYTES and columns(kind, size) != int(np.prod(shape)):
        raise ValueError(f"{found.name} does not divide into blocks")
    return GgufTensor(path, found.name, kind, shape, int(found.data_offset), size)
