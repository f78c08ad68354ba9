"""What an engine asks to compile the stretches that come again."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

from regraft.runtime.coexec.compiled import Job, Like, Whole, compile_function
from regraft.runtime.coexec.hooks import compiling, keep_traces_apart, quietly
from regraft.runtime.coexec.kept import fetch, name, own_options, store
from regraft.runtime.coexec.pieces import Pieces
from regraft.runtime.coexec.recorded import Function, OnDevice, Recorded
from regraft.runtime.coexec.stretch import Entry, Plan, Result, Unfit, plan
from regraft.runtime.coexec.trace import Traced
from regraft.runtime.coexec.worker import Worker

log = logging.getLogger("regraft")
_known: dict[str, Function | Pieces] = {}  # by what they compute
_workers: dict[int, Worker] = {}
MOST = 256
WORKERS = max(1, min(4, (os.cpu_count() or 1) // 4))


class Compiler:
    """Compiles stretches as an engine asks for them.

    background: while the program goes on, by processes of their own where these can; otherwise at
    once. waiting, made: how many are to be compiled, and were; functions: how many of these were
    like none before, at most LIMIT.
    """

    LIMIT = 32

    def __init__(self, backend: str = "inductor", background: bool = True) -> None:
        self.backend, self._background = backend, background
        self.apart = background and backend == "inductor"
        self.waiting = self.made = self.functions = 0
        self._lock = threading.Lock()

    @property
    def busy(self) -> bool:
        return self.waiting >= WORKERS

    def __call__(
        self, stretch: Any, described: list[Any], numbers: list[Any], wanted: list[Result]
    ) -> None:
        start = time.perf_counter()
        with quietly():
            try:
                found = plan([Entry(entry) for entry in described], numbers, wanted)
                task = _Task(self, stretch, found)
            except Exception as error:
                return _refuse(stretch, error, time.perf_counter() - start)
        self._count(1, 0)
        if self._background and not task.ready:
            _pool().submit(self._run, task)
        else:
            self._run(task)

    def _run(self, task: _Task) -> None:
        try:
            task.run()
        finally:
            self._count(-1, 1)

    def _count(self, waiting: int, made: int) -> None:
        with self._lock:
            self.waiting, self.made = self.waiting + waiting, self.made + made


@cache
def _pool() -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(WORKERS, "regraft-compile")

    def end() -> None:
        pool.shutdown(wait=False, cancel_futures=True)
        Worker.over = True
        for worker in list(_workers.values()):
            worker.end()

    threading._register_atexit(end)  # type: ignore[attr-defined]  # before threads are waited for
    return pool


def _worker() -> Worker:
    """This thread's."""
    return _workers.setdefault(threading.get_ident(), Worker())


def _refuse(stretch: Any, error: Exception, seconds: float) -> None:
    if isinstance(error, Unfit):
        return stretch.refuse(str(error), seconds, error.cuts)
    log.debug("a stretch is not compiled", exc_info=error)
    text = str(error).strip().splitlines() or [""]
    stretch.refuse(f"{type(error).__name__}: {text[0][:120]}", seconds, [])


class _Task:
    """All that compiling needs, taken while the program waits; holds none of its tensors."""

    def __init__(self, compiler: Compiler, stretch: Any, found: Plan) -> None:
        self._compiler, self._stretch = compiler, stretch
        self._job = Job(Traced(found), list(map(Like.of, found.tensors)), compiler.backend)
        self._where = found.inputs, found.outputs, found.first, found.writes, set(found.varying)
        self._key = name(self._job.computed)
        self.ready = self._look() and getattr(_known[self._key], "loaded", True)

    def _look(self) -> bool:
        """Whether the function was made before, by this process or another."""
        if self._key not in _known:
            if (found := fetch(self._key)) is None:
                return False
            _keep(self._key, found)
        return True

    def run(self) -> None:
        start = time.perf_counter()
        try:
            function = self._function()
        except Exception as error:
            return _refuse(self._stretch, error, time.perf_counter() - start)
        traced, placed, results = self._job.traced, [], []
        if isinstance(function, Pieces):
            results = function.results
            for address, (calls, *where) in zip(function.addresses, function.places, strict=True):
                placed.append((traced.end(calls), address, *where))
        self._stretch.attach(
            function, *self._where, placed, results, traced.random, traced.differentiable,
            self._job.device.type == "cuda", time.perf_counter() - start,
        )  # fmt: skip

    def _function(self) -> Function | Pieces:
        if not self._look():
            self._compile()
        function, device, traced = _known[self._key], self._job.device, self._job.traced
        if isinstance(function, Whole):
            with _apart():
                function.load()
        if isinstance(function, Pieces) or device.type == "cpu":
            return function
        whole = all(x.device == device for x in self._job.inputs) and not traced.differentiable
        if whole and self._job.backend == "inductor":
            function = Recorded(function, self._where[3])
        return OnDevice(function, device) if traced.varying else function

    def _compile(self) -> None:
        compiler = self._compiler
        if compiler.functions >= Compiler.LIMIT:
            raise Unfit(f"{Compiler.LIMIT} functions were compiled already")
        compiler.functions += 1
        if compiler.apart and _worker().compile(self._job) and self._look():
            return
        with _apart():
            function = compile_function(self._job)
        _keep(self._key, function)
        if isinstance(function, Pieces):
            store(self._key, function)


@contextmanager
def _apart() -> Iterator[None]:
    """For compilers in the program's process, one at a time."""
    from torch._dynamo.convert_frame import compile_lock

    keep_traces_apart()
    with compiling(), compile_lock, own_options():
        yield


def _keep(key: str, function: Function | Pieces) -> None:
    while len(_known) >= MOST:
        _known.pop(next(iter(_known)), None)
    _known[key] = function
