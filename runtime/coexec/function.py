"""Functions and blocks whose tensor operators run apart from the Python that issues them."""

from __future__ import annotations

import functools
import inspect
import logging
import statistics
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from regraft.program.errors import RegraftError
from regraft.runtime.coexec.build import extension
from regraft.runtime.coexec.compiler import Compiler
from regraft.runtime.coexec.hooks import install, wrap_dynamo
from regraft.runtime.coexec.report import Report, caller, ended, made

WARM, MOST_WARM, WORTH, AGAIN, SETTLED = 2, 20, 0.95, 8, 24
TRIALS, MORE, SECONDS = 8, 32, 0.5  # of each kind: at least, and at most unless that is short
WARMING, COMPILING, TRYING, EAGER = "warming up", "compiling", "on trial", "eager"
ASIDE, HERE = "co-executed on two threads", "co-executed on one thread"
COMPILED, AHEAD = "co-executed, compiled", "co-executed, compiled, on two threads"
BACKENDS = ("inductor", "aten", "replay")

log = logging.getLogger("regraft")
_pool: list[Any] = []


class Coexecuted:
    """A function under co-execution; calling it is calling the function.

    Raises what the function raises. An error that depends on values (an index out of range) comes
    where Python next waits for a value, as it does on CUDA.
    """

    def __init__(
        self, function: Callable[..., Any], backend: str, measure: bool, overlap: bool
    ) -> None:
        if backend not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise RegraftError(f"coexecute(backend={backend!r}): one of {known}")
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise RegraftError(
                f"coexecute({_name(function)}): asynchronous functions change threads and order; "
                "co-execute the functions that they call"
            )
        if not callable(function):
            raise RegraftError(f"coexecute takes a function or module, not {function!r}")
        functools.update_wrapper(self, function, updated=())
        self._function, self._measure, self._overlap = function, measure, overlap
        self._compiler = None if backend == "replay" else Compiler(backend, measure)
        kinds: tuple[str, ...] = (EAGER, HERE, COMPILED) if self._compiler else (EAGER, HERE)
        if overlap:
            kinds += (ASIDE, AHEAD) if self._compiler else (ASIDE,)
        self._kinds = kinds
        self._mode, self._calls, self._repeats = WARMING if measure else self._kinds[-1], 0, 0
        self._quiet = 0  # calls since anything was compiled
        self._again = 0  # the call from which kinds are timed anew
        self._times: dict[str, list[float]] = {kind: [] for kind in self._kinds}
        self._threads = threading.local()
        self._engines: list[Any] = []
        weakref.finalize(self, _release, self._engines).atexit = False
        made(self.report)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        engine = self._engine()
        if engine is None or self._mode == EAGER or extension().active():
            return self._function(*args, **kwargs)
        if inspect.isgeneratorfunction(self._function):
            return _generate(engine, self._overlap, self._function(*args, **kwargs))
        self._calls += 1
        if self._mode == WARMING:
            return self._warm(engine, args, kwargs)
        if self._mode == COMPILING:
            return self._compile(engine, args, kwargs)
        if self._measure and self._calls == self._again:  # the machine may be busier than it was
            self._mode, self._times = TRYING, {kind: [] for kind in self._kinds}
        if self._mode == TRYING:
            return self._time(engine, args, kwargs)
        return self._run(self._mode, engine, args, kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __reduce__(self) -> str:
        return self.__qualname__

    @property
    def settled(self) -> bool:
        """Whether how calls run is decided, until it is looked at again."""
        return self._mode not in (WARMING, COMPILING, TRYING)

    def report(self) -> Report:
        """What ran how so far."""
        report = Report(_name(self._function), self._mode, self._calls)
        for engine in self._engines:
            report.add(engine.stats(), engine.trace())
        if all(self._times.values()):
            eager, *others = self._medians().values()
            report.eager_s, report.coexecuted_s = eager, min(others)
        return report

    def _engine(self) -> Any:
        found = getattr(self._threads, "engine", None)
        if found is None and (ext := extension()) is not None:
            found = self._threads.engine = new_engine(ext)
            self._engines.append(found)
        return found

    def _run(self, kind: str, engine: Any, args: Any, kwargs: Any) -> Any:
        if kind == EAGER:
            return self._function(*args, **kwargs)
        compiler = self._compiler if kind in (COMPILED, AHEAD) else None
        return run(engine, kind in (ASIDE, AHEAD), self._function, args, kwargs, compiler)

    def _warm(self, engine: Any, args: Any, kwargs: Any) -> Any:
        """Until calls repeat."""
        before = engine.stats()
        result = self._run(ASIDE if self._overlap else HERE, engine, args, kwargs)
        after = engine.stats()
        new = {key: after[key] - before[key] for key in ("deferred", "recorded", "at_once")}
        repeats = new["deferred"] * 2 > sum(new.values())
        self._repeats = self._repeats + 1 if repeats else 0
        if self._repeats >= WARM:
            self._mode = COMPILING if self._compiler else TRYING
        elif self._calls >= MOST_WARM:
            self._stay_eager(f"its operators did not repeat in {self._calls} calls")
        return result

    def _compile(self, engine: Any, args: Any, kwargs: Any) -> Any:
        """Until what can be compiled is; calls go on, eagerly while compilers are busy."""
        assert self._compiler is not None
        made = self._compiler.made
        kind = EAGER if self._compiler.busy else self._kinds[-1]
        result = self._run(kind, engine, args, kwargs)
        idle = self._compiler.waiting == 0 and self._compiler.made == made
        self._quiet = self._quiet + 1 if idle else 0
        if self._quiet >= SETTLED:
            self._mode = TRYING
        return result

    def _time(self, engine: Any, args: Any, kwargs: Any) -> Any:
        """Calls of each kind in turn, to keep the fastest; every round begins with another one,
        since calls may differ by turns themselves."""
        timed = sum(map(len, self._times.values()))
        kind = self._kinds[(timed + timed // len(self._kinds)) % len(self._kinds)]
        _wait_for_devices()
        start = time.perf_counter()
        result = self._run(kind, engine, args, kwargs)
        _wait_for_devices()
        self._times[kind].append(time.perf_counter() - start)
        fewest = min(map(len, self._times.values()))
        if fewest >= MORE or (fewest >= TRIALS and sum(self._times[EAGER]) > SECONDS):
            self._decide()
        return result

    def _medians(self) -> dict[str, float]:
        return {kind: statistics.median(times) for kind, times in self._times.items()}

    def _decide(self) -> None:
        self._again = AGAIN * self._calls
        medians = self._medians()
        best = min(self._kinds[1:], key=lambda kind: medians[kind])
        ratio = medians[best] / medians[EAGER]
        if ratio > WORTH:
            return self._stay_eager(f"co-execution takes {ratio:.2f} times as long")
        self._mode = best

    def _stay_eager(self, reason: str) -> None:
        self._mode = EAGER
        log.warning("regraft: %s stays eager: %s", _name(self._function), reason)


def coexecute(
    function: Callable[..., Any] | None = None,
    *,
    backend: str = "inductor",
    measure: bool = True,
    overlap: bool = True,
) -> Any:
    """The function, its Python run as it is and its tensor operators apart.

    A decorator, with or without arguments, or a call. The first calls record what operators give;
    later ones put operators off and run them in order, in whole stretches, until Python wants a
    value. backend: "inductor" compiles stretches that come again, backward passes and updates of
    parameters included: to pieces that begin on a second core before the stretch has come whole,
    and on CUDA to recorded graphs. "aten" runs the graphs that it is given, unfused, and "replay"
    the operators themselves.
    measure: time calls of each kind first and keep the fastest, eager among them; stretches are
    compiled meanwhile, by processes of their own where these can, and calls are eager as long as
    these are busy. Without it they are compiled as they come, and calls wait. overlap: run
    operators on another thread besides Python's.

    Replayed values, gradients, random numbers and errors are eager's, to the bit; compiled ones
    within rounding, with eager's random numbers; an index out of range may be a RuntimeError there.

    Not seen: numpy arrays of a tensor made before the first use of co-execution in the process and
    written while it runs, and ``torch.default_generator``'s own methods (torch.manual_seed and the
    like are). Backward passes through hooks, functions of one's own or graphs of earlier calls run
    at once, as does all under autocast or inference mode and on devices other than CPU and CUDA.
    """
    if function is None:
        return functools.partial(coexecute, backend=backend, measure=measure, overlap=overlap)
    if isinstance(function, Coexecuted):
        return function
    return Coexecuted(function, backend, measure, overlap)


@contextmanager
def coexecution(*, overlap: bool = True) -> Iterator[Callable[[], Report]]:
    """The block under co-execution; gives a function that reports on it.

    All values are there when the block ends. Inside another one it does nothing of its own.
    """
    ext = extension()
    engine = None if ext is None else new_engine(ext)
    mode = EAGER if engine is None else ASIDE if overlap else HERE
    report = Report(f"block at {caller()}", mode, 1)
    if engine is None or not _enter(engine, False, overlap):
        yield lambda: report
        return

    def now() -> Report:
        found = Report(report.name, mode, 1)
        found.add(engine.stats(), engine.trace())
        return found

    weakref.finalize(now, _release, [engine]).atexit = False
    try:
        yield now
    except BaseException as error:
        _leave(engine, error)
        raise
    _leave(engine, None)
    ended(now)


def new_engine(ext: Any) -> Any:
    install(ext)
    return _pool.pop() if _pool else ext.new_engine()


def run(
    engine: Any,
    overlap: bool,
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
    compiler: Any = None,
) -> Any:
    if not _enter(engine, True, overlap, compiler):
        return function(*args, **kwargs)
    try:
        result = function(*args, **kwargs)
    except BaseException as error:
        _leave(engine, error)
        raise
    _leave(engine, None)
    return result


def _enter(engine: Any, anchored: bool, overlap: bool, compiler: Any = None) -> bool:
    if "torch._dynamo.eval_frame" in sys.modules:
        wrap_dynamo(extension())
    return engine.enter(anchored, overlap, compiler)


def _leave(engine: Any, error: BaseException | None) -> None:
    """An operator's error comes before that of the Python that ran ahead of it."""
    try:
        engine.leave()
    except Exception as earlier:
        raise earlier from error


def _generate(engine: Any, overlap: bool, generator: Any) -> Any:
    """The generator, each of its turns under co-execution."""
    turn: Callable[..., Any] = generator.__next__
    value: tuple[Any, ...] = ()
    while True:
        try:
            item = run(engine, overlap, turn, value, {})
        except StopIteration as stop:
            return stop.value
        try:
            turn, value = generator.send, ((yield item),)
        except GeneratorExit:
            generator.close()
            raise
        except BaseException as error:
            turn, value = generator.throw, (error,)


def _release(engines: list[Any]) -> None:
    for engine in engines:
        engine.forget()
        _pool.append(engine)


def _wait_for_devices() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
