"""Growing tensors and the rotations of cached positions."""

from __future__ import annotations

import torch
from torch import Tensor


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

    def reserve(self, count: int) -> None:
        """Have room for at least count more rows, and zeros in all of it."""
        if self.data is None:
            return
        old, length = self.data, self.length
        capacity = max(old.shape[-2], -(-(length + count) // self.step) * self.step)
        self.data = old.new_zeros(*old.shape[:-2], capacity, old.shape[-1])
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

    def drop_front(self, count: int) -> None:
        """Remove the first count rows and shrink the allocation."""
        rest = self.view.narrow(-2, count, self.length - count)
        self.reset()
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

    Positions whose keys are all quantized settle to float16; the others stay exact.
    """

    def __init__(self) -> None:
        self._settled = [Buffer(64, 1.0) for _ in range(2)]
        self._exact = [Buffer() for _ in range(2)]

    @property
    def length(self) -> int:
        return self._settled[0].length + self._exact[0].length

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._settled + self._exact)

    def rows(self, start: int, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B or 1, stop - start, r/2] of positions start..stop-1.

        float16 where all of them have settled, else of the appended type.
        """
        stop, edge = self.length if stop is None else stop, self._settled[0].length
        if stop <= edge:
            cos, sin = (buffer.view[:, start:stop] for buffer in self._settled)
        elif start >= edge:
            cos, sin = (buffer.view[:, start - edge : stop - edge] for buffer in self._exact)
        else:
            cos, sin = (
                torch.cat((old.view[:, start:].to(new.view.dtype), new.view[:, : stop - edge]), 1)
                for old, new in zip(self._settled, self._exact, strict=True)
            )
        return cos, sin

    def append(self, cos: Tensor, sin: Tensor) -> None:
        """Add the rows cos, sin [B or 1, S, r/2] of S new positions."""
        for buffer, x in zip(self._exact, (cos, sin), strict=True):
            buffer.append(x)

    def settle(self, length: int) -> None:
        """Keep the first length positions in float16 from now on."""
        count = length - self._settled[0].length
        if count > 0:
            for settled, exact in zip(self._settled, self._exact, strict=True):
                settled.append(exact.view[:, :count].half())
                exact.drop_front(count)

    def truncate(self, length: int) -> None:
        check_length(length, self.length)
        edge = min(length, self._settled[0].length)
        for settled, exact in zip(self._settled, self._exact, strict=True):
            exact.truncate(max(length - settled.length, 0))
            settled.truncate(edge)

    def reorder(self, index: Tensor) -> None:
        """Select batch rows; a table shared by the batch (B = 1) stays shared."""
        for buffer in self._settled + self._exact:
            if buffer.batch > 1:
                buffer.reorder(index)

    def reset(self) -> None:
        for buffer in self._settled + self._exact:
            buffer.reset()


def check_length(length: int, current: int) -> None:
    if not 0 <= length <= current:
        raise ValueError(f"cannot truncate a cache of length {current} to {length}")
