"""Key/value caches: dense and quantized layers, rotation tables, and their state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.kernels.attention.reference import attention
from regraft.kernels.kvquant.reference import (
    dequantize,
    normal_float_codebook,
    pack,
    quantize,
    unpack,
)
from regraft.kernels.rotary.reference import rotate
from regraft.runtime.recurrent import RecurrentStates


class Buffer:
    """A tensor [B, ..., capacity, C] filled along its second-last dimension."""

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
    def nbytes(self) -> int:
        return 0 if self.data is None else self.data.nbytes

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
        _check_length(length, self.length)
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
    """Cosines and sines [B or 1, length, r/2] of every cached position."""

    def __init__(self) -> None:
        self._cos, self._sin = Buffer(), Buffer()

    @property
    def cos(self) -> Tensor:
        return self._cos.view

    @property
    def sin(self) -> Tensor:
        return self._sin.view

    @property
    def length(self) -> int:
        return self._cos.length

    @property
    def nbytes(self) -> int:
        return self._cos.nbytes + self._sin.nbytes

    def append(self, cos: Tensor, sin: Tensor) -> None:
        """Add the rows cos, sin [B or 1, S, r/2] of S new positions."""
        self._cos.append(cos)
        self._sin.append(sin)

    def truncate(self, length: int) -> None:
        self._cos.truncate(length)
        self._sin.truncate(length)

    def reorder(self, index: Tensor) -> None:
        """Select batch rows; a table shared by the batch (B = 1) stays shared."""
        if self.length and self.cos.shape[0] > 1:
            self._cos.reorder(index)
            self._sin.reorder(index)

    def reset(self) -> None:
        self._cos.reset()
        self._sin.reset()


class DenseLayer:
    """Exact cache of rotated keys [B, Hkv, T, D] and values [B, Hkv, T, Dv]."""

    floor = 0

    def __init__(self) -> None:
        self._key, self._value = Buffer(), Buffer()

    @property
    def length(self) -> int:
        return self._key.length

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
        rows = q.shape[2]
        q = _rotate_last(q, table, rows, interleaved, offset)
        self.append(_rotate_last(k, table, rows, interleaved, offset), v)
        return self.attend(q, mask, scale, softcap, sinks, causal, window)

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

    Keys are stored unrotated, coded per channel over `group` tokens; values are coded per
    token and head. The body holds uint8 codes [B, Hkv, T, D * bits / 8] with float16
    scales and zeros. The tail keeps at least `tail` exact tokens once the body is in use.
    """

    def __init__(self, bits: int, sink: int = 4, tail: int = 32, group: int = 64) -> None:
        self.bits, self.sink, self.tail, self.group = bits, sink, tail, group
        self._codebook = normal_float_codebook(bits)
        self._sinks = [Buffer(max(sink, 1), 1.0) for _ in range(2)]
        self._tails = [Buffer(16, 1.0) for _ in range(2)]
        self._codes = [Buffer(256, 1.03) for _ in range(2)]
        self._key_scales = [Buffer(max(256 // group, 1), 1.03) for _ in range(2)]
        self._value_scales = [Buffer(256, 1.03) for _ in range(2)]
        self._sizes = (0, 0)

    @property
    def _buffers(self) -> list[Buffer]:
        scales = self._key_scales + self._value_scales
        return self._sinks + self._tails + self._codes + scales

    @property
    def length(self) -> int:
        return self._sinks[0].length + self._codes[0].length + self._tails[0].length

    @property
    def floor(self) -> int:
        """The shortest nonzero length truncate can reach."""
        body = self._codes[0].length
        return self._sinks[0].length + body if body else 0

    @property
    def nbytes(self) -> int:
        return self._codebook.nbytes + sum(buffer.nbytes for buffer in self._buffers)

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

        New tokens are attended exactly; whole groups are coded afterwards.
        """
        self._append(k, v)
        keys, values = self._read(q.dtype)
        q = _rotate_last(q, table, q.shape[2], interleaved, offset)
        keys = _rotate_last(keys, table, keys.shape[2], interleaved, offset)
        out = attention(q, keys, values, mask, scale, softcap, sinks, causal, window)
        self._flush()
        return out

    step = append_and_attend

    def read(
        self, kind: int, table: RotationTable | None, interleaved: bool = False, offset: int = 0
    ) -> Tensor:
        """The rotated keys (kind 0) or the values (kind 1) [B, Hkv, T, *], decoded."""
        x = self._read(self._tails[0].view.dtype)[kind]
        return x if kind else _rotate_last(x, table, x.shape[2], interleaved, offset)

    def truncate(self, length: int) -> None:
        """Keep the first length tokens; only exact tokens can be cut, or all of them."""
        _check_length(length, self.length)
        if length == 0:
            return self.reset()
        if length < self.floor:
            raise ValueError(
                f"cannot truncate to {length}: tokens before {self.floor} are quantized in "
                f"whole groups; truncate to at least {self.floor}, or to 0"
            )
        for sink, tail in zip(self._sinks, self._tails, strict=True):
            kept = min(sink.length, length)
            tail.truncate(max(length - kept - self._codes[0].length, 0))
            sink.truncate(kept)

    def reorder(self, index: Tensor) -> None:
        for buffer in self._buffers:
            buffer.reorder(index)

    def reset(self) -> None:
        for buffer in self._buffers:
            buffer.reset()

    def _append(self, k: Tensor, v: Tensor) -> None:
        if k.shape[-1] % 8 or v.shape[-1] % 8:
            raise ValueError("quantized caches need head sizes that are multiples of 8")
        self._sizes = (k.shape[-1], v.shape[-1])
        self._codebook = self._codebook.to(k.device)
        room = 0 if self._tails[0].length else max(self.sink - self._sinks[0].length, 0)
        for x, sink, tail in zip((k, v), self._sinks, self._tails, strict=True):
            if room:
                sink.append(x[:, :, :room])
            if x.shape[2] > room:
                tail.append(x[:, :, room:])

    def _read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        parts = zip(self._sinks, self._body(dtype), self._tails, strict=True)
        keys, values = (
            torch.cat([p for p in (_filled(s), body, _filled(t)) if p is not None], 2)
            for s, body, t in parts
        )
        return keys, values

    def _body(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        if not self._codes[0].length:
            return None, None
        key_codes, value_codes = (
            unpack(codes.view, self.bits, size)
            for codes, size in zip(self._codes, self._sizes, strict=True)
        )
        scale, zero = (buffer.view.unsqueeze(3) for buffer in self._key_scales)
        grouped = key_codes.unflatten(2, (-1, self.group))
        keys = dequantize(grouped, scale, zero, self._codebook).flatten(2, 3)
        scale, zero = (buffer.view for buffer in self._value_scales)
        values = dequantize(value_codes, scale, zero, self._codebook)
        return keys.to(dtype), values.to(dtype)

    def _flush(self) -> None:
        """Move whole groups from the tail's front into the body, keeping `tail` tokens."""
        count = (self._tails[0].length - self.tail) // self.group * self.group
        if count <= 0:
            return
        keys, values = (tail.view[:, :, :count] for tail in self._tails)
        codes, scale, zero = quantize(
            keys.unflatten(2, (-1, self.group)), self._codebook, 3, torch.float16
        )
        self._codes[0].append(pack(codes.flatten(2, 3), self.bits))
        self._key_scales[0].append(scale.squeeze(3))
        self._key_scales[1].append(zero.squeeze(3))
        codes, scale, zero = quantize(values, self._codebook, 3, torch.float16)
        self._codes[1].append(pack(codes, self.bits))
        self._value_scales[0].append(scale)
        self._value_scales[1].append(zero)
        for tail in self._tails:
            tail.drop_front(count)


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
        layer = self.layers[0]
        buffer = layer._key if isinstance(layer, DenseLayer) else layer._buffers[0]
        return 0 if buffer.data is None else buffer.data.shape[0]

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
        _check_length(length, self.length)
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


def _rotate_last(
    x: Tensor, table: RotationTable | None, rows: int, interleaved: bool, offset: int
) -> Tensor:
    if table is None:
        return x
    return rotate(x, table.cos[:, -rows:], table.sin[:, -rows:], interleaved, offset)


def _filled(buffer: Buffer) -> Tensor | None:
    return buffer.view if buffer.length else None


def _check_length(length: int, current: int) -> None:
    if not 0 <= length <= current:
        raise ValueError(f"cannot truncate a cache of length {current} to {length}")
