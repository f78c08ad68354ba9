"""One-token steps on CUDA, recorded once a cache and replayed: no launches from Python.

A recording reads and writes whole buffers at a position held on the device, so it serves until
the cache outgrows them.
"""

from __future__ import annotations

import operator
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from regraft.kernels.ops import causal_mask
from regraft.kernels.rotary.reference import rotate
from regraft.runtime import lower
from regraft.runtime.cache import CacheState, DenseLayer
from regraft.runtime.regions import wanted

Given = tuple[Tensor, Tensor, Tensor] | None  # mask, positions, keep; None: no padding
ROOM = 512
WARM_UP = 2


def at_position(step: fx.GraphModule) -> fx.GraphModule | None:
    """step(ids, mask, positions, keep, cache) -> logits and the new rows of its rotation tables,
    for one token at ``cache.position`` of full buffers; None where masks need host sizes."""
    graph = fx.Graph()
    output = graph.graph_copy(step.graph, {})
    graph.output(output)
    static = fx.GraphModule(step, graph)
    if not _only_masks_read_the_length(graph):
        return None
    swap = {lower._length: _position, lower._mask: _mask, lower._table: _rows,
            lower._attend: _attend}  # fmt: skip
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = swap.get(node.target, node.target)
    tables = graph.find_nodes(op="call_function", target=_rows)
    result = graph.output_node()
    result.args = ((result.args[0], tuple(tables)),)
    static.recompile()
    return static


def _only_masks_read_the_length(graph: fx.Graph) -> bool:
    waiting = list(graph.find_nodes(op="call_function", target=lower._length))
    while waiting:
        for user in waiting.pop().users:
            if user.target is lower._mask:
                continue
            if torch.is_tensor(user.meta.get("val")) or user.op == "output":
                return False
            waiting.append(user)
    others = (lower._update, lower._joined, lower._present, lower._read_states)
    return not any(node.target in others for node in graph.nodes)


def _position(cache: Any) -> Tensor:
    return cache.position


def _mask(padding, queries, keys, offset, window, batch) -> Tensor:
    return causal_mask(padding, 1, padding.shape[1], offset, window, batch)


def _rows(cache: Any, cos: Tensor, sin: Tensor, index: int) -> tuple[Tensor, Tensor]:
    return cos, sin


def _attend(cache, index, q, k, v, rows, mask, scale, softcap, sinks, interleaved, offset):
    layer = cache.layers[index]
    write = _fused() if q.is_cuda and wanted() else _write
    q = write(cache.position, q, k, v, rows, *layer.buffers, interleaved, offset)
    return layer.attend_at(cache.position, q, mask, scale, softcap, sinks)


def _write(position, q, k, v, rows, key, value, interleaved, offset):
    """Write the rotated keys and the values of a token at its position; its rotated queries."""
    if rows is not None:
        q, k = rotate(q, *rows, interleaved, offset), rotate(k, *rows, interleaved, offset)
    key.index_copy_(2, position, k)
    value.index_copy_(2, position, v)
    return q


@cache
def _fused() -> Any:
    """``_write`` as one or two kernels."""
    return torch.compile(_write)


class Recording:
    """The step on one cache: inputs, outputs and kernels at fixed addresses.

    A replay leaves position, positions and mask ready for the token after it.
    """

    def __init__(self, step: fx.GraphModule, ids: Tensor, given: Given, cache: CacheState) -> None:
        for layer in cache.layers:
            layer.reserve(ROOM)
        capacity, rows = cache.layers[0].buffers[0].shape[-2], ids.shape[0]
        mask, _, keep = given or (ids, None, [0])
        self.ids = ids.clone()
        self.wide = mask.new_zeros(rows, capacity + 1)
        self.mask = self.wide[:, :capacity]
        self.positions, self.keep, cache.position = (
            torch.zeros(shape, dtype=torch.long, device=ids.device)
            for shape in ((rows, 1), len(keep), 1)
        )
        self.ready = -1  # the length of a cache without padding that the inputs are ready for
        self._set(ids, given, cache)
        inputs = self.ids, self.mask, self.positions, self.keep, cache
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                _, tables = step(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        for table, (cos, _) in zip(cache.tables, tables, strict=True):
            table.reserve(ROOM, cos.shape[0])
        self.buffers = _buffers(cache)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits, tables = step(*inputs)
            for table, made in zip(cache.tables, tables, strict=True):
                for buffer, x in zip(table.buffers, made, strict=True):
                    buffer.index_copy_(-2, cache.position, x)
            cache.position.add_(1)
            self.positions.add_(1)
            self.wide.index_fill_(1, cache.position, 1)
        self.ready = -1

    def fits(self, ids: Tensor, given: Given, cache: CacheState) -> bool:
        buffers, kept = _buffers(cache), 1 if given is None else len(given[2])
        return (
            len(buffers) == len(self.buffers)
            and all(map(operator.is_, buffers, self.buffers))
            and ids.shape == self.ids.shape
            and kept == len(self.keep)
            and cache.length < min(buffer.shape[-2] for buffer in buffers)
        )

    def _set(self, ids: Tensor, given: Given, cache: CacheState) -> None:
        length = cache.length
        self.ids.copy_(ids)
        if given is not None:
            mask, positions, keep = given
            self.mask[:, : length + 1].copy_(mask)
            self.positions.copy_(positions)
            self.keep.copy_(keep)
        elif self.ready != length:
            self.wide.zero_()[:, : length + 1] = 1
            self.positions.fill_(length)
            self.keep.zero_()
        if self.ready != length:
            cache.position.fill_(length)
        self.ready = -1 if given else length

    def replay(self, ids: Tensor, given: Given, cache: CacheState) -> Tensor:
        self._set(ids, given, cache)
        self.graph.replay()
        for part in (*cache.layers, *cache.tables):
            part.advance()
        self.ready += self.ready >= 0
        return self.logits.clone()


def _buffers(cache: CacheState) -> list[Tensor]:
    return [x for part in (*cache.layers, *cache.tables) for x in part.buffers]


class DecodeGraph:
    """Replays one-token steps; ``takes`` says which."""

    def __init__(self, step: fx.GraphModule) -> None:
        self.step = at_position(step)

    def takes(self, ids: Tensor, cache: CacheState) -> bool:
        return (
            self.step is not None
            and ids.is_cuda
            and ids.shape[1] == 1
            and cache.length > 0
            and all(isinstance(layer, DenseLayer) for layer in cache.layers)
        )

    def __call__(self, ids: Tensor, given: Given, cache: CacheState) -> Tensor:
        """ids [batch, 1] -> logits [batch, kept, vocab]."""
        assert self.step is not None
        if cache.recording is None or not cache.recording.fits(ids, given, cache):
            cache.recording = Recording(self.step, ids, given, cache)
        return cache.recording.replay(ids, given, cache)
