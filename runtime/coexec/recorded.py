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

    Inputs that are found at the same address in the first calls, as parameters are, are read and
    written there; others are copied to where the graph reads. Where one moves later, the graph is
    recorded anew, at most TRIES times. Results are copies: the graph's own memory is written again
    at the next call.
    """

    WATCHED, TRIES = 3, 3

    def __init__(self, function: Function, writes: Sequence[int]) -> None:
        self._function, self._writes = function, set(writes)
        self._tries = 0
        self._forget()

    def _forget(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._seen, self._calls = [], 0
        self._moves: set[int] = set()

    def __call__(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        if self._tries > self.TRIES:
            return self._function(tensors)
        places = [_address(x) for x in tensors]
        if self._graph is not None:
            if self._fits(places):
                return self._replay(tensors)
            self._forget()
        self._watch(places)
        if self._calls <= self.WATCHED or self._moves & self._writes:
            return self._function(tensors)
        with quietly():
            return self._record(tensors)

    def _fits(self, places: list[int]) -> bool:
        pairs = zip(places, self._seen, strict=True)
        return all(a == b for i, (a, b) in enumerate(pairs) if i not in self._moves)

    def _watch(self, places: list[int]) -> None:
        if self._seen:
            pairs = zip(places, self._seen, strict=True)
            self._moves |= {i for i, (a, b) in enumerate(pairs) if a != b}
        self._seen, self._calls = places, self._calls + 1

    def _record(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        """This call's results; those of later calls come from the graph."""
        self._tries += 1
        results = self._function(list(tensors))
        self._sources = [x.clone() if i in self._moves else x for i, x in enumerate(tensors)]
        self._moving = sorted(self._moves)
        graph = torch.cuda.CUDAGraph()
        try:
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
        if self._moving:
            torch._foreach_copy_(
                [self._sources[i] for i in self._moving], [tensors[i] for i in self._moving]
            )
        self._graph.replay()
        made = [torch.empty_like(x) for x in self._results]
        if made:
            torch._foreach_copy_(made, self._results)
        return made


class OnDevice:
    """A function whose last argument, numbers, is moved to its device first."""

    def __init__(self, function: Function, device: torch.device) -> None:
        self._function, self._device = function, device

    def __call__(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        return self._function([*tensors[:-1], tensors[-1].to(self._device)])
