"""One-token steps on CUDA, recorded once a cache and replayed: no launches from Python.

A recording reads and writes whole buffers at a position held on the device, so it serves until
the cache outgrows them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from regraft.kernels.ops import causal_mask
from regraft.kernels.rotary.reference import rotate
from regraft.runtime import lower
from regraft.runtime.cache import CacheState, DenseLayer
from regraft.runtime.regions import wanted

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
    """The step on one cache: inputs, outputs and kernels at fixed addresses."""

    def __init__(self, step: fx.GraphModule, inputs: tuple[Tensor, ...], cache: CacheState) -> None:
        ids, mask, positions, keep = inputs
        for layer in cache.layers:
            layer.reserve(ROOM)
        self.first = cache.layers[0].full
        capacity = self.first.shape[2]
        self.ids, self.positions, self.keep = ids.clone(), positions.clone(), keep.clone()
        self.mask = mask.new_zeros(mask.shape[0], capacity)
        cache.position = torch.zeros(1, dtype=torch.long, device=ids.device)
        self._set(inputs, cache)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                step(self.ids, self.mask, self.positions, self.keep, cache)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits, self.tables = step(self.ids, self.mask, self.positions, self.keep, cache)

    def fits(self, inputs: tuple[Tensor, ...], cache: CacheState) -> bool:
        ids, mask, _, keep = inputs
        full = cache.layers[0].full
        same = full is self.first and ids.shape == self.ids.shape and len(keep) == len(self.keep)
        return same and mask.shape[1] <= full.shape[2]

    def _set(self, inputs: tuple[Tensor, ...], cache: CacheState) -> None:
        ids, mask, positions, keep = inputs
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.keep.copy_(keep)
        self.mask[:, : mask.shape[1]].copy_(mask)
        cache.position.fill_(cache.length)

    def replay(self, inputs: tuple[Tensor, ...], cache: CacheState) -> Tensor:
        self._set(inputs, cache)
        self.graph.replay()
        for layer in cache.layers:
            layer.advance()
        for table, rows in zip(cache.tables, self.tables, strict=True):
            table.append(*rows)
        return self.logits.clone()


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

    def __call__(self, *inputs: Tensor, cache: CacheState) -> Tensor:
        assert self.step is not None
        if cache.recording is None or not cache.recording.fits(inputs, cache):
            cache.recording = Recording(self.step, inputs, cache)
        return cache.recording.replay(inputs, cache)
