"""Key/value caches: dense and quantized layers, and the state of a generation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regraft.kernels.attention.reference import attention
from regraft.kernels.kvquant.grouped import codebook, look_up, pack, quantize, word_table
from regraft.kernels.rotary.reference import rotate
from regraft.runtime.buffer import Buffer, RotationTable, check_length
from regraft.runtime.recurrent import RecurrentStates

VALUE_STEP = 8


class DenseLayer:
    """Exact cache of rotated keys [B, Hkv, T, D] and values [B, Hkv, T, Dv]."""

    floor = 0

    def __init__(self) -> None:
        self._key, self._value = Buffer(), Buffer()

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
        return attention(q, self.key, self.value, mask, scale, softcap, sinks, causal, window)

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
        q = _rotate(q, table, start, interleaved, offset)
        self.append(_rotate(k, table, start, interleaved, offset), v)
        return self.attend(q, mask, scale, softcap, sinks, causal, window)

    @property
    def full(self) -> Tensor | None:
        """The keys and the room after them [B, Hkv, capacity, D]."""
        return self._key.data

    def reserve(self, count: int) -> None:
        """Make room for this many more tokens."""
        self._key.reserve(count)
        self._value.reserve(count)

    def step_at(
        self,
        position: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        scale: float,
        softcap: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """``step`` for one rotated token at position [1] of the full buffers, whose length stays;
        mask [B, 1, 1, capacity] is True where the token attends."""
        key, value = self._key.data, self._value.data
        assert key is not None and value is not None
        key.index_copy_(2, position, k)
        value.index_copy_(2, position, v)
        return attention(q, key, value, mask, scale, softcap, sinks, causal=False)

    def advance(self) -> None:
        """Count the token that ``step_at`` wrote."""
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


class QuantizedLayer:
    """Cache with exact first and last tokens and a packed body between them.

    Keys are coded per channel over `group` tokens before rotation, values per token over all
    heads. The body holds uint8 codes [B, Hkv, T, D * bits / 8] with float16 scales and zeros, and
    grows by whole groups: a copy a group is less than what attention reads of it. The last
    `tail` tokens at least stay exact; sink keys are kept rotated.
    """

    def __init__(
        self,
        bits: int,
        sink: int = 4,
        tail: int = 32,
        group: int = 64,
        levels: str = "lloyd_max",
    ) -> None:
        self.bits, self.sink, self.tail, self.group = bits, sink, tail, group
        self.levels = levels
        self._sinks = [Buffer(max(sink, 1), 1.0) for _ in range(2)]
        self._tails = [Buffer(VALUE_STEP, 1.0) for _ in range(2)]
        self._codes = [Buffer(group, 1.0) for _ in range(2)]
        self._key_scales = [Buffer(1, 1.0) for _ in range(2)]
        self._value_scales = [Buffer(group, 1.0) for _ in range(2)]

    @property
    def _buffers(self) -> list[Buffer]:
        scales = self._key_scales + self._value_scales
        return self._sinks + self._tails + self._codes + scales

    @property
    def length(self) -> int:
        return self._sinks[0].length + self._codes[0].length + self._tails[0].length

    @property
    def batch(self) -> int:
        return max(self._sinks[0].batch, self._tails[0].batch)

    @property
    def floor(self) -> int:
        """The shortest nonzero length truncate can reach."""
        body = self._codes[1].length
        return self._sinks[1].length + body if body else 0

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor allocated for this layer."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def append_and_attend(
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
        """Append unrotated k, v [B, Hkv, S, *] and attend unrotated q; out [B, Hq, S, Dv].

        New tokens are attended exactly. What left the tail is coded before a step of up to `tail`
        tokens, so that truncating undoes the step, and also after a longer one, a prompt.
        """
        turn = partial(_rotate, table=table, interleaved=interleaved, offset=offset)
        levels = codebook(self.levels, self.bits, q.device)
        start = self.length
        self._flush(levels)
        if table is not None and self._codes[0].length:
            table.settle(self._sinks[0].length + self._codes[0].length)
        self._append(k, v, turn)
        keys, values = self._read(q.dtype, turn)
        q = turn(q, start=start)
        out = attention(q, keys, values, mask, scale, softcap, sinks, causal, window)
        if k.shape[2] > self.tail:
            self._flush(levels)
        return out

    step = append_and_attend

    def read(
        self, kind: int, table: RotationTable | None, interleaved: bool = False, offset: int = 0
    ) -> Tensor:
        """The rotated keys (kind 0) or the values (kind 1) [B, Hkv, T, *], decoded."""
        exact = self._tails[0] if self._tails[0].length else self._sinks[0]
        turn = partial(_rotate, table=table, interleaved=interleaved, offset=offset)
        return self._read(exact.view.dtype, turn)[kind]

    def truncate(self, length: int) -> None:
        """Keep the first length tokens; only exact tokens can be cut, or all of them."""
        check_length(length, self.length)
        if length == 0:
            return self.reset()
        if length < self.floor:
            raise ValueError(
                f"cannot truncate to {length}: tokens before {self.floor} are quantized; "
                f"truncate to at least {self.floor}, or to 0"
            )
        for sink, codes, tail in zip(self._sinks, self._codes, self._tails, strict=True):
            kept = min(sink.length, length)
            tail.truncate(max(length - kept - codes.length, 0))
            sink.truncate(kept)

    def reorder(self, index: Tensor) -> None:
        for buffer in self._buffers:
            buffer.reorder(index)

    def reset(self) -> None:
        for buffer in self._buffers:
            buffer.reset()

    def _append(self, k: Tensor, v: Tensor, turn: Callable[..., Tensor]) -> None:
        if k.shape[-1] % 8 or v.shape[-1] % 8:
            raise ValueError("quantized caches need head sizes that are multiples of 8")
        room = 0 if self._tails[0].length else max(self.sink - self._sinks[0].length, 0)
        if room:
            self._sinks[0].append(turn(k[:, :, :room], start=self.length))
            self._sinks[1].append(v[:, :, :room])
        if k.shape[2] > room:
            for x, tail in zip((k, v), self._tails, strict=True):
                tail.append(x[:, :, room:])

    def _read(self, dtype: torch.dtype, turn: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of every cached token."""
        (sink, key_tail), (value_sink, value_tail) = zip(self._sinks, self._tails, strict=True)
        keys, values = [], []
        if sink.length:
            keys.append(sink.view)
            values.append(value_sink.view)
        edge = sink.length + self._codes[0].length
        if self._codes[0].length:
            keys.append(turn(self._body_keys(dtype), start=sink.length))
        if self._codes[1].length:
            values.append(self._body_values(dtype))
        if key_tail.length:
            keys.append(turn(key_tail.view, start=edge))
        if value_tail.length:
            values.append(value_tail.view)
        return torch.cat(keys, 2), torch.cat(values, 2)

    def _body_keys(self, dtype: torch.dtype) -> Tensor:
        codes = self._codes[0].view
        keys = look_up(codes, word_table(self.levels, self.bits, codes.device))
        scale, zero = (buffer.view.unsqueeze(3).float() for buffer in self._key_scales)
        return keys.unflatten(2, (-1, self.group)).mul_(scale).add_(zero).flatten(2, 3).to(dtype)

    def _body_values(self, dtype: torch.dtype) -> Tensor:
        codes = self._codes[1].view
        values = look_up(codes, word_table(self.levels, self.bits, codes.device))
        scale, zero = (buffer.view.float() for buffer in self._value_scales)
        return values.mul_(scale).add_(zero).to(dtype)

    def _flush(self, levels: Tensor) -> None:
        """Code the tail's front: keys by whole groups, values by VALUE_STEP, keeping `tail`."""
        if (count := self._leaving(0, self.group)) > 0:
            groups = self._tails[0].view[:, :, :count].unflatten(2, (-1, self.group))
            codes, scale, zero = quantize(groups, levels, 3)
            self._codes[0].append(pack(codes.flatten(2, 3), self.bits))
            self._key_scales[0].append(scale.squeeze(3))
            self._key_scales[1].append(zero.squeeze(3))
            self._tails[0].drop_front(count)
        if (count := self._leaving(1, VALUE_STEP)) > 0:
            codes, scale, zero = quantize(self._tails[1].view[:, :, :count], levels, (1, 3))
            self._codes[1].append(pack(codes, self.bits))
            self._value_scales[0].append(scale)
            self._value_scales[1].append(zero)
            self._tails[1].drop_front(count)

    def _leaving(self, index: int, step: int) -> int:
        return (self._tails[index].length - self.tail) // step * step


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
