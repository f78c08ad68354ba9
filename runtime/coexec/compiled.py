"""One function of Inductor for a stretch of operators, backward passes and updates included."""

from __future__ import annotations

import atexit
import logging
import time
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regraft.runtime.coexec.hooks import compiling, keep_traces_apart, quietly
from regraft.runtime.coexec.kept import fetch, name, store
from regraft.runtime.coexec.pieces import Pieces, compiled, cut, ends
from regraft.runtime.coexec.recorded import Function, OnDevice, Recorded
from regraft.runtime.coexec.stretch import Entry, Plan, Result, Unfit, plan
from regraft.runtime.coexec.trace import Traced

log = logging.getLogger("regraft")
_known: dict[str, Function | Pieces] = {}  # by what they compute
MOST = 256
# padding is chosen by measuring on random matrices, drawn from the program's own generator
OPTIONS = {"fallback_random": True, "size_asserts": False, "nan_asserts": False,
           "shape_padding": False}  # fmt: skip
IN_ORDER = {"reorder_for_locality": False, "reorder_for_peak_memory": False}  # for what draws
PLAIN = {"loop_ordering_after_fusion": False}  # where the first attempt fails, as Inductor may


class Compiler:
    """Compiles stretches as an engine asks for them.

    backend: "inductor", or "aten" for the graph as it was traced. background: one after another on
    a thread of its own while the program goes on; otherwise at once. waiting, made: how many are to
    be compiled, and were; functions: how many of these were like none before, at most LIMIT.
    """

    LIMIT = 32

    def __init__(self, backend: str = "inductor", background: bool = True) -> None:
        self.backend, self._background = backend, background
        self.waiting = self.made = self.functions = 0

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
        self.waiting += 1
        if self._background and not task.ready:
            _pool().submit(self._run, task)
        else:
            self._run(task)

    def _run(self, task: _Task) -> None:
        try:
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

    def __init__(self, compiler: Compiler, stretch: Any, found: Plan) -> None:
        self._compiler, self._stretch, self._traced = compiler, stretch, Traced(found)
        self._writes = found.writes
        self._where = found.inputs, found.outputs, found.first, found.writes, set(found.varying)
        metas = [(x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in found.tensors]
        self._devices = dict.fromkeys(x.device for x in found.tensors)
        self._key = name(f"{compiler.backend} {self._traced.signature()} {metas}")
        self.ready = self._look()
        if not self.ready:
            self._fake_inputs(found)

    def _look(self) -> bool:
        """Whether the function was made before, by this process or another."""
        if self._key not in _known:
            if (pieces := fetch(self._key)) is None:
                return False
            _keep(self._key, pieces)
        return True

    def _fake_inputs(self, found: Plan) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self._mode = FakeTensorMode(
            shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True
        )
        made = {id(out) for entry in found.entries for out in entry.outs}
        self._inputs = [_fake(self._mode, x, id(x) in made) for x in found.tensors]

    def run(self) -> None:
        start = time.perf_counter()
        try:
            function = self._function()
        except Exception as error:
            return _refuse(self._stretch, error, time.perf_counter() - start)
        placed, results = [], []
        if isinstance(function, Pieces):
            results = function.results
            for address, (calls, *where) in zip(function.addresses, function.places, strict=True):
                placed.append((self._traced.end(calls), address, *where))
        self._stretch.attach(
            function, *self._where, placed, results, self._traced.random,
            self._traced.differentiable, self._device.type == "cuda", time.perf_counter() - start,
        )  # fmt: skip

    def _function(self) -> Function | Pieces:
        if self._key not in _known:
            self._compile()
        function = _known[self._key]
        if isinstance(function, Pieces) or self._device.type == "cpu":
            return function
        whole = list(self._devices) == [self._device] and not self._traced.differentiable
        if whole and self._compiler.backend == "inductor":
            function = Recorded(function, self._writes)
        return OnDevice(function, self._device) if self._traced.varying else function

    @property
    def _device(self) -> torch.device:
        return next((d for d in self._devices if d.type != "cpu"), torch.device("cpu"))

    def _compile(self) -> None:
        from torch._dynamo.convert_frame import compile_lock

        compiler = self._compiler
        if compiler.functions >= Compiler.LIMIT:
            raise Unfit(f"{Compiler.LIMIT} functions were compiled already")
        keep_traces_apart()
        with compiling(), compile_lock:
            function = compile_function(
                self._traced, self._inputs, self._device, self._mode, compiler.backend
            )
        compiler.functions += 1
        _keep(self._key, function)
        if isinstance(function, Pieces):
            store(self._key, function)


def _keep(key: str, function: Function | Pieces) -> None:
    while len(_known) >= MOST:
        _known.pop(next(iter(_known)))
    _known[key] = function


def _fake(mode: Any, x: Tensor, pending: bool) -> Tensor:
    if not pending and not (x.requires_grad and not x.is_leaf):
        return mode.from_tensor(x)
    with mode:
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return made.requires_grad_(x.requires_grad)


def compile_function(
    traced: Traced, inputs: Sequence[Tensor], device: torch.device, mode: Any, backend: str
) -> Function | Pieces:
    """list of tensors -> list of tensors, some of the former written; numbers come last."""
    from torch.fx.experimental.proxy_tensor import make_fx

    given = list(inputs)
    with mode, torch.enable_grad():
        if traced.varying:
            given.append(torch.empty(len(traced.varying), dtype=torch.float64, device=device))
        graph = make_fx(traced, tracing_mode="real")(*given)
    _draw_apart(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    if backend == "inductor" and device.type == "cpu":
        made = _pieces(graph, traced, len(inputs))
        if made is not None:
            return made
    function: Any = graph if backend == "aten" else _inductor(graph, given, traced)

    def call(tensors: list[Tensor]) -> Sequence[Tensor]:
        with quietly():
            return function(*tensors)

    return call


def _draw_apart(graph: torch.fx.Graph) -> None:
    """Inductor may read what bernoulli_ writes before it does; here it is an operator apart."""
    draw = _bernoulli()
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.bernoulli_.float):
        target, *rest = node.args
        with graph.inserting_before(node):
            drawn = graph.call_function(draw, (target, *(rest or [0.5])))
            copied = graph.call_function(torch.ops.aten.copy_.default, (target, drawn))
        for new in (drawn, copied):
            new.meta.update(node.meta)
        node.replace_all_uses_with(copied)
        graph.erase_node(node)


@cache
def _bernoulli() -> Any:
    name = "regraft_coexec::bernoulli"
    torch.library.register_fake(name, lambda like, p: torch.empty_like(like))
    return torch.ops.regraft_coexec.bernoulli.default


def _pieces(graph: torch.fx.GraphModule, traced: Traced, inputs: int) -> Pieces | None:
    """None where it is to be one function of Python's."""
    where = ends(traced.entries, traced.passes, traced.length)
    found = None if traced.differentiable else cut(graph.graph, where, inputs)
    if found is None:
        return None
    places, files = [], []
    for part in found[0]:
        try:
            file = compiled(part, _options(traced))
        except Exception as error:
            log.debug("a stretch is compiled to Python, not to C++", exc_info=error)
            file = None
        if file is None:
            return None
        calls = bisect_left(traced.entries, part.end)
        places.append((calls, part.inputs, part.outputs, part.writes))
        files.append(file)
    return Pieces(places, found[1], files)


def _options(traced: Traced) -> dict[str, Any]:
    return OPTIONS | IN_ORDER if traced.random else OPTIONS


def _inductor(graph: torch.fx.GraphModule, given: Sequence[Tensor], traced: Traced) -> Any:
    from torch._functorch import config as aot
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    differentiable = traced.differentiable
    grad = torch.enable_grad if differentiable else torch.no_grad
    examples = [x.detach().requires_grad_(differentiable and x.requires_grad) for x in given]

    def attempt(options: dict[str, Any]) -> Any:
        with grad(), config.patch(options), aot.patch(force_non_lazy_backward_lowering=True):
            return compile_fx(graph, examples)

    try:
        return attempt(_options(traced))
    except Exception as error:
        log.debug("a stretch is compiled anew with its loops as they are", exc_info=error)
        return attempt(_options(traced) | PLAIN)
