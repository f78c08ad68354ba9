"""Growing tensors and the rotations of cached positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.kernels.kvquant.layout import BLOCK, pack_table


class Buffer:
    """A tensor [B, ..., capacity, C] filled along its second-last dimension.

    A full one is copied to a capacity ``growth`` times as large, up to a multiple of ``step``.
    """

    def __init__(self, step: int = 256, growth: float = 1.25) -> None:
        self.step, self.growth = step, growth
        self.length = 0
        self.data: Tensor | None = None

    @property
    def view(self) -> Tensor:
        """The filled part [B, ..., length, C]."""
        if self.data is None:
            raise ValueError("the cache is empty")
        return self.data.narrow(-2, 0, self.length)

    @property
    def batch(self) -> int:
        return 0 if self.data is None else self.data.shape[0]

    @property
    def nbytes(self) -> int:
        return 0 if self.data is None else self.data.nbytes

    def reserve(self, count: int, batch: int = 1) -> None:
        """Have room for at least count more rows of so many sequences, and zeros in all of it."""
        if self.data is None:
            return
        old, length = self.data, self.length
        capacity = max(old.shape[-2], -(-(length + count) // self.step) * self.step)
        shape = max(batch, old.shape[0]), *old.shape[1:-2], capacity, old.shape[-1]
        self.data = old.new_zeros(shape)
        self.data.narrow(-2, 0, length).copy_(old.narrow(-2, 0, length))

    def append(self, x: Tensor) -> None:
        """Add x [B, ..., n, C] at the end; a size-1 batch broadcasts."""
        needed = self.length + x.shape[-2]
        old = self.data
        batch = x.shape[0] if old is None else max(x.shape[0], old.shape[0])
        capacity = 0 if old is None else old.shape[-2]
        if old is None or needed > capacity or batch != old.shape[0]:
            if needed > capacity:
                wanted = max(needed, int(self.growth * capacity))
                capacity = -(-wanted // self.step) * self.step
            data = x.new_empty(batch, *x.shape[1:-2], capacity, x.shape[-1])
            if old is not None:
                data.narrow(-2, 0, self.length).copy_(old.narrow(-2, 0, self.length))
            self.data = old = data
        old.narrow(-2, self.length, x.shape[-2]).copy_(x)
        self.length = needed

    def drop(self, start: int, count: int) -> None:
        """Remove count rows from start on and shrink the allocation."""
        first, last = self.view[..., :start, :], self.view[..., start + count :, :]
        rest = torch.cat((first, last), -2)
        self.reset()
        if rest.shape[-2]:
            self.append(rest)

    def truncate(self, length: int) -> None:
        check_length(length, self.length)
        if length:
            self.length = length
        else:
            self.reset()

    def reorder(self, index: Tensor) -> None:
        if self.data is not None:
            self.data = self.data.index_select(0, index)

    def reset(self) -> None:
        self.length, self.data = 0, None


class RotationTable:
    """Cosines and sines [B or 1, length, r/2] of every cached position.

    Rows whose keys are quantized are packed for the kernels; those before them are not kept.
    """

    def __init__(self) -> None:
        self._exact = Buffer(), Buffer()
        self._packed = Buffer(1, 1.0)
        self._start, self._gone = 0, 0
        self._last: Any = None, None

    @property
    def length(self) -> int:
        return self._gone + self._exact[0].length

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (*self._exact, self._packed))

    @property
    def pairs(self) -> int:
        """Channel pairs that are rotated."""
        return self._exact[0].view.shape[-1]

    def rows(self, start: int, stop: int, pairs: int | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B or 1, stop - start, r/2 or pairs] of positions not packed away.

        Pairs beyond those that are rotated have cosine 1.
        """
        wanted = start, stop, pairs or self.pairs
        if self._last[0] != wanted:
            here = slice(start - self._gone, stop - self._gone)
            cos, sin = (buffer.view[:, here] for buffer in self._exact)
            if rest := wanted[2] - self.pairs:
                cos, sin = F.pad(cos, (0, rest), value=1.0), F.pad(sin, (0, rest))
            self._last = wanted, (cos, sin)
        return self._last[1]

    def append(self, cos: Tensor, sin: Tensor) -> None:
        """Add the rows cos, sin [B or 1, S, r/2] of S new positions."""
        packed = self._start + BLOCK * self._packed.length if self._packed.length else 0
        for buffer, x in zip(self._exact, (cos, sin), strict=True):
            if packed > self._gone:
                buffer.drop(0, packed - self._gone)
            buffer.append(x)
        self._gone = max(packed, self._gone)
        self._last = None, None

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Cosines and sines of positions not packed away, room for later ones included."""
        return tuple(buffer.data for buffer in self._exact if buffer.data is not None)

    def reserve(self, count: int, batch: int) -> None:
        """Make room for this many more positions of so many sequences."""
        for buffer in self._exact:
            buffer.reserve(count, batch)

    def advance(self) -> None:
        """Count the position whose rows were written into the buffers."""
        for buffer in self._exact:
            buffer.length += 1
        self._last = None, None

    def packed(self, start: int, blocks: int, pairs: int, layout: str) -> Tensor:
        """The rows of ``blocks`` blocks of 32 positions from start on, see ``pack_table``.

        Pairs that are not rotated have cosine 1. Rows are kept until the next append.
        """
        self._start = start
        if (new := blocks - self._packed.length) > 0:
            first = start + BLOCK * self._packed.length
            rows = self.rows(first, first + BLOCK * new, pairs)
            self._packed.append(pack_table(*rows, layout))
        assert self._packed.data is not None
        return self._packed.data

    def truncate(self, length: int) -> None:
        check_length(length, self.length)
        if not length:
            return self.reset()
        for buffer in self._exact:
            buffer.truncate(length - self._gone)
        self._last = None, None

    def reorder(self, index: Tensor) -> None:
        """Select batch rows; a table shared by the batch (B = 1) stays shared."""
        for buffer in (*self._exact, self._packed):
            if buffer.batch > 1:
                buffer.reorder(index)
        self._last = None, None

    def reset(self) -> None:
        for buffer in (*self._exact, self._packed):
            buffer.reset()
        self._gone, self._last = 0, (None, None)


def check_length(length: int, current: int) -> None:
    if not 0 <= length <= current:
        raise ValueError(f"cannot truncate a cache of length {current} to {length}")
