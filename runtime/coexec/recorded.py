"""A compiled function of CUDA tensors as one CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from regraft.runtime.coexec.hooks import quietly

Function = Callable[[list[Tensor]], Sequence[Tensor]]
log = logging.getLogger("regraft")
_address = torch._C.TensorBase.data_ptr  # not the one that waits for values


class Recorded:
    """list of CUDA tensors -> list of CUDA tensors, some of the former (``writes``) written.

    Inputs that stay at one address, as parameters do, are read and written there. One that moves
    is copied to where the graph reads, and back if it is written; the graph is recorded anew, at
    most TRIES times. Results are copies: the graph's own memory is written again at the next call.
    """

    WATCHED, TRIES = 2, 6

    def __init__(self, function: Function, writes: Sequence[int]) -> None:
        self._function, self._writes = function, list(writes)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._places: list[int] = []
        self._moves: set[int] = set()
        self._calls = self._tries = 0

    def __call__(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        if self._tries > self.TRIES:
            return self._function(tensors)
        places = [_address(x) for x in tensors]
        before = self._places or places
        moved = {i for i, (a, b) in enumerate(zip(places, before, strict=True)) if a != b}
        if self._graph is not None and moved <= self._moves:
            return self._replay(tensors)
        self._moves |= moved
        self._places, self._graph, self._calls = places, None, self._calls + 1
        if self._calls <= self.WATCHED:
            return self._function(tensors)
        with quietly():
            return self._record(tensors)

    def _record(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        """This call's results; those of later calls come from the graph."""
        self._tries += 1
        results = self._function(list(tensors))
        self._moving = sorted(self._moves)
        self._moving_writes = [i for i in self._writes if i in self._moves]
        graph = torch.cuda.CUDAGraph()
        try:
            self._sources = [_copy(x) if i in self._moves else x for i, x in enumerate(tensors)]
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._results = list(self._function(list(self._sources)))
        except Exception as error:  # what cannot be recorded goes on without
            log.debug("a compiled function is not recorded as a CUDA graph", exc_info=error)
            self._tries = self.TRIES + 1
            return results
        self._graph = graph
        return results

    def _replay(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        assert self._graph is not None
        sources = self._sources
        _copy_all([sources[i] for i in self._moving], [tensors[i] for i in self._moving])
        self._graph.replay()
        back = self._moving_writes
        _copy_all([tensors[i] for i in back], [sources[i] for i in back])
        torch.autograd.graph.increment_version([tensors[i] for i in self._writes])
        made = [torch.empty_like(x) for x in self._results]
        _copy_all(made, self._results)
        return made


def _copy_all(places: list[Tensor], tensors: list[Tensor]) -> None:
    if places:
        torch._foreach_copy_(places, tensors)


def _copy(x: Tensor) -> Tensor:
    """In the same layout, gaps included; an error where elements share a place."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


class OnDevice:
    """A function whose last argument, numbers, is moved to its device first."""

    def __init__(self, function: Function, device: torch.device) -> None:
        self._function, self._device = function, device

    def __call__(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        return self._function([*tensors[:-1], tensors[-1].to(self._device)])
