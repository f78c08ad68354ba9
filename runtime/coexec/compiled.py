"""One function of Inductor for a stretch of operators, backward passes and updates included."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regraft.runtime.coexec.hooks import quietly
from regraft.runtime.coexec.stretch import Entry, Plan, Result, Unfit, plan
from regraft.runtime.coexec.trace import Traced

log = logging.getLogger("regraft")
_lock = threading.Lock()
_known: dict[str, Callable[..., Any]] = {}
OPTIONS = {"fallback_random": True, "size_asserts": False, "nan_asserts": False}


class Compiler:
    """Compiles stretches as an engine asks for them.

    backend: "inductor", or "aten" for the graph as it was traced. background: one after another on
    a thread of its own while the program goes on; otherwise at once. waiting, made: how many are to
    be compiled, and were.
    """

    def __init__(self, backend: str = "inductor", background: bool = True) -> None:
        self._backend, self._background = backend, background
        self.waiting = self.made = 0

    def __call__(
        self, stretch: Any, described: list[Any], numbers: list[Any], wanted: list[Result]
    ) -> None:
        start = time.perf_counter()
        with quietly():
            try:
                found = plan([Entry(entry) for entry in described], numbers, wanted)
                task = _Task(stretch, found, self._backend)
            except Exception as error:
                return _refuse(stretch, error, time.perf_counter() - start)
        self.waiting += 1
        if self._background:
            _pool().submit(self._run, task)
        else:
            self._run(task)

    def _run(self, task: _Task) -> None:
        try:
            with quietly(), _lock:
                task.run()
        finally:
            self.waiting, self.made = self.waiting - 1, self.made + 1


@cache
def _pool() -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(1, "regraft-compile")
    atexit.register(pool.shutdown, wait=False, cancel_futures=True)
    return pool


def _refuse(stretch: Any, error: Exception, seconds: float) -> None:
    if isinstance(error, Unfit):
        return stretch.refuse(str(error), seconds, error.cuts)
    log.debug("a stretch is not compiled", exc_info=error)
    text = str(error).strip().splitlines() or [""]
    stretch.refuse(f"{type(error).__name__}: {text[0][:120]}", seconds, [])


class _Task:
    """All that compiling needs, taken while the program waits; holds none of its tensors."""

    def __init__(self, stretch: Any, found: Plan, backend: str) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self._stretch, self._traced, self._backend = stretch, Traced(found), backend
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        made = {id(out) for entry in found.entries for out in entry.outs}
        self._inputs = [_fake(self._mode, x, id(x) in made) for x in found.tensors]
        self._where = found.inputs, found.outputs, found.first, found.writes, set(found.varying)

    def run(self) -> None:
        start = time.perf_counter()
        try:
            function = self._function()
        except Exception as error:
            return _refuse(self._stretch, error, time.perf_counter() - start)
        seconds = time.perf_counter() - start
        self._stretch.attach(function, *self._where, self._traced.differentiable, seconds)

    def _function(self) -> Callable[..., Any]:
        metas = [(x.shape, x.stride(), x.dtype, x.requires_grad) for x in self._inputs]
        key = f"{self._backend} {self._traced.signature()} {metas}"
        if key not in _known:
            _known[key] = compile_function(self._traced, self._inputs, self._mode, self._backend)
        return _known[key]


def _fake(mode: Any, x: Tensor, pending: bool) -> Tensor:
    if not pending and not (x.requires_grad and not x.is_leaf):
        return mode.from_tensor(x)
    with mode:
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return made.requires_grad_(x.requires_grad)


def compile_function(
    traced: Traced, inputs: Sequence[Tensor], mode: Any, backend: str
) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """list of tensors -> list of tensors, some of the former written."""
    from torch._functorch import config as aot
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch.fx.experimental.proxy_tensor import make_fx

    given = list(inputs)
    with mode, torch.enable_grad():
        if traced.varying:
            given.append(torch.empty(len(traced.varying), dtype=torch.float64))
        graph = make_fx(traced, tracing_mode="real")(*given)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    if backend == "aten":
        return lambda tensors: graph(*tensors)
    mode_of_grad = torch.enable_grad if traced.differentiable else torch.no_grad
    examples = [x.detach().requires_grad_(traced.differentiable and x.requires_grad) for x in given]
    with mode_of_grad(), config.patch(OPTIONS), aot.patch(force_non_lazy_backward_lowering=True):
        compiled: Any = compile_fx(graph, examples)
    return lambda tensors: compiled(*tensors)
