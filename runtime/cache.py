"""Key/value caches: dense and quantized layers, and the state of a generation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regraft.kernels.attention.dispatch import attend
from regraft.kernels.compiled import KernelError, tell, wanted
from regraft.kernels.rotary.llvm import fits, write
from regraft.kernels.rotary.reference import rotate
from regraft.runtime.buffer import Buffer, RotationTable, check_length
from regraft.runtime.quantized import QuantizedLayer
from regraft.runtime.recurrent import RecurrentStates


class DenseLayer:
    """Exact cache of rotated keys [B, Hkv, T, D] and values [B, Hkv, T, Dv]."""

    floor = 0

    def __init__(self, kernels: bool = True) -> None:
        self._key, self._value = Buffer(), Buffer()
        self._kernels = kernels

    @property
    def length(self) -> int:
        return self._key.length

    @property
    def batch(self) -> int:
        return self._key.batch

    @property
    def nbytes(self) -> int:
        return self._key.nbytes + self._value.nbytes

    @property
    def key(self) -> Tensor:
        return self._key.view

    @property
    def value(self) -> Tensor:
        return self._value.view

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add rotated keys [B, Hkv, S, D] and values [B, Hkv, S, Dv]."""
        self._key.append(k)
        self._value.append(v)

    def update(self, kind: int, x: Tensor) -> Tensor:
        """Append to the keys (kind 0) or the values (kind 1); all of them [B, Hkv, T, *]."""
        buffer = self._value if kind else self._key
        buffer.append(x)
        return buffer.view

    def read(
        self, kind: int, table: RotationTable | None, interleaved: bool = False, offset: int = 0
    ) -> Tensor:
        """The rotated keys (kind 0) or the values (kind 1) [B, Hkv, T, *]."""
        return self.value if kind else self.key

    def attend(
        self,
        q: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        causal: bool = True,
        window: int = 0,
    ) -> Tensor:
        """Attend rotated q [B, Hq, S, D], the last S positions, to the whole cache."""
        return attend(
            *(q, self.key, self.value, mask, scale, softcap, sinks, causal, window),
            kernels=self._kernels,
        )

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: RotationTable | None = None,
        mask: Tensor | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        interleaved: bool = False,
        offset: int = 0,
        causal: bool = True,
        window: int = 0,
    ) -> Tensor:
        """Append unrotated k, v [B, Hkv, S, *] and attend unrotated q; out [B, Hq, S, Dv]."""
        start = self.length
        turned = self._write(q, k, v, table, interleaved, offset)
        if turned is None:
            turned = _rotate(q, table, start, interleaved, offset)
            self.append(_rotate(k, table, start, interleaved, offset), v)
        return self.attend(turned, mask, scale, softcap, sinks, causal, window)

    def _write(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: RotationTable | None,
        interleaved: bool,
        offset: int,
    ) -> Tensor | None:
        """Rotated q, after appending rotated k and v, where one kernel does all of it."""
        key, value, start = self._key.data, self._value.data, self.length
        if table is None or not (self._kernels and wanted()):
            return None
        cos, sin = table.rows(start, start + q.shape[2])
        if not fits(q, k, v, cos, key, offset) or start == key.shape[2]:
            return None
        try:
            turned = write(q, k, v, cos, sin, key, value, start, interleaved, offset)
        except KernelError as error:
            tell("rotations run by reference, slower", error)
            return None
        self.advance()
        return turned

    @property
    def full(self) -> Tensor | None:
        """The keys and the room after them [B, Hkv, capacity, D]."""
        return self._key.data

    def reserve(self, count: int) -> None:
        """Make room for this many more tokens."""
        self._key.reserve(count)
        self._value.reserve(count)

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, capacity, D], room for later tokens included."""
        key, value = self._key.data, self._value.data
        assert key is not None and value is not None
        return key, value

    def attend_at(
        self,
        position: Tensor,
        q: Tensor,
        mask: Tensor,
        scale: float,
        softcap: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attend with one rotated token, whose key and value are at position [1] of the buffers;
        mask [B, 1, 1, capacity] is True where it attends."""
        return attend(
            *(q, *self.buffers, mask, scale, softcap, sinks),
            causal=False,
            position=position,
            kernels=self._kernels,
        )

    def advance(self) -> None:
        """Count the token that was written into the buffers."""
        self._key.length += 1
        self._value.length += 1

    def truncate(self, length: int) -> None:
        self._key.truncate(length)
        self._value.truncate(length)

    def reorder(self, index: Tensor) -> None:
        self._key.reorder(index)
        self._value.reorder(index)

    def reset(self) -> None:
        self._key.reset()
        self._value.reset()


class CacheState:
    """The layers, rotation tables and recurrent states of one generation, advanced together."""

    def __init__(
        self,
        layers: list[DenseLayer | QuantizedLayer],
        tables: list[RotationTable] | None = None,
        states: RecurrentStates | None = None,
    ) -> None:
        self.layers = layers
        self.tables = [] if tables is None else tables
        self.states = states
        self.position: Tensor | None = None
        self.recording: Any = None

    @property
    def parts(self) -> list[Any]:
        """Everything that is truncated, reordered and reset together."""
        return [*self.layers, *self.tables, *([] if self.states is None else [self.states])]

    @property
    def length(self) -> int:
        return self.parts[0].length if self.layers or self.states else 0

    @property
    def batch(self) -> int:
        """Sequences in the cache."""
        if not self.layers:
            return 0 if self.states is None else self.states.batch
        return max(layer.batch for layer in self.layers)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def truncate(self, length: int) -> None:
        """Keep the first length tokens everywhere, or change nothing and raise ValueError."""
        floor = max((layer.floor for layer in self.layers), default=0)
        if 0 < length < floor:
            raise ValueError(
                f"cannot truncate to {length}: tokens before {floor} are quantized; "
                f"truncate to at least {floor}, or to 0"
            )
        check_length(length, self.length)
        if self.states is not None:
            self.states.check(length)
        for part in self.parts:
            part.truncate(length)

    def reorder(self, index: Tensor) -> None:
        """Replace batch row i by row index[i]; index [new B]."""
        for part in self.parts:
            part.reorder(index)

    def reset(self) -> None:
        for part in self.parts:
            part.reset()


def _rotate(
    x: Tensor, table: RotationTable | None, start: int, interleaved: bool, offset: int
) -> Tensor:
    """Rotate x [B, H, S, D] of positions start..start+S-1."""
    if table is None:
        return x
    return rotate(x, *table.rows(start, start + x.shape[2]), interleaved, offset)
