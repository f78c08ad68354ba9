"""One function of Inductor for a stretch of operators, backward passes and updates included."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regraft.runtime.coexec.hooks import quietly
from regraft.runtime.coexec.pieces import Pieces, compiled, cut, ends
from regraft.runtime.coexec.recorded import Function
from regraft.runtime.coexec.trace import Traced

log = logging.getLogger("regraft")
# padding is chosen by measuring on random matrices, drawn from the program's own generator; the
# processor says what it has, programs to test that take seconds
OPTIONS = {"fallback_random": True, "size_asserts": False, "nan_asserts": False,
           "shape_padding": False, "cpp.vec_isa_ok": True}  # fmt: skip
IN_ORDER = {"reorder_for_locality": False, "reorder_for_peak_memory": False}  # for what draws
PLAIN = {"loop_ordering_after_fusion": False}  # where the first attempt fails, as Inductor may


@dataclass(frozen=True)
class Like:
    """What compiling needs of a tensor; stride: in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    conj: bool
    neg: bool

    @staticmethod
    def of(x: Tensor) -> Like:
        flags = x.requires_grad, x.is_conj(), x.is_neg()
        return Like(tuple(x.shape), x.stride(), x.dtype, x.device, *flags)

    def fake(self) -> Tensor:
        """One like it; under a fake mode."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        made = made.conj() if self.conj else made
        made = torch._neg_view(made) if self.neg else made
        return made.detach().requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Job:
    """A stretch to compile. backend: "inductor", or "aten" for the graph as it was traced."""

    traced: Traced
    inputs: Sequence[Like]
    backend: str

    @property
    def computed(self) -> str:
        """What, as text."""
        return f"{self.backend} {self.traced.signature()} {list(self.inputs)}"

    @property
    def device(self) -> torch.device:
        devices = (x.device for x in self.inputs)
        return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


class Whole:
    """One function of Inductor for a whole stretch, as another process may have made it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._function: Any = None

    @property
    def loaded(self) -> bool:
        return self._function is not None

    def __call__(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        with quietly():
            return self.load()(*tensors)

    def load(self) -> Any:
        """Its code; takes seconds the first time, and is not for two threads."""
        if self._function is None:
            from torch._inductor.standalone_compile import AOTCompiledArtifact

            self._function = AOTCompiledArtifact.deserialize(self.data)
        return self._function


def compile_function(job: Job, keep: bool = False) -> Function | Pieces:
    """list of tensors -> list of tensors, some of the former written; numbers come last.

    keep: give pieces or a ``Whole``, as far as can be; may draw random numbers.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    traced, device, backend = job.traced, job.device, job.backend
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
    with mode, torch.enable_grad():
        given = [like.fake() for like in job.inputs]
        if traced.varying:
            given.append(torch.empty(len(traced.varying), dtype=torch.float64, device=device))
        graph = make_fx(traced, tracing_mode="real")(*given)
    _draw_apart(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    if backend == "inductor" and device.type == "cpu":
        made = _pieces(graph, traced, len(job.inputs))
        if made is not None:
            return made
    if keep and backend == "inductor":
        return _whole(graph, given, traced, mode)
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
    from torch._inductor.compile_fx import compile_fx

    def attempt(options: dict[str, Any]) -> Any:
        with _options_and_grad(options, traced), aot.patch(force_non_lazy_backward_lowering=True):
            return compile_fx(graph, _examples(given, traced))

    return _second_time_plain(attempt, traced)


def _whole(
    graph: torch.fx.GraphModule, given: Sequence[Tensor], traced: Traced, mode: Any
) -> Whole:
    from torch._guards import TracingContext, tracing
    from torch._inductor import standalone_compile

    def attempt(options: dict[str, Any]) -> Any:
        examples: list[Any] = _examples(given, traced)
        with _options_and_grad(options, traced), tracing(TracingContext(mode)):
            return standalone_compile(
                graph, examples, dynamic_shapes="from_tracing_context", aot=True
            )

    return Whole(_second_time_plain(attempt, traced).serialize())


def _second_time_plain(attempt: Callable[[dict[str, Any]], Any], traced: Traced) -> Any:
    try:
        return attempt(_options(traced))
    except Exception as error:
        log.debug("a stretch is compiled anew with its loops as they are", exc_info=error)
        return attempt(_options(traced) | PLAIN)


def _examples(given: Sequence[Tensor], traced: Traced) -> list[Tensor]:
    return [x.detach().requires_grad_(traced.differentiable and x.requires_grad) for x in given]


@contextmanager
def _options_and_grad(options: dict[str, Any], traced: Traced) -> Iterator[None]:
    from torch._inductor import config

    with torch.set_grad_enabled(traced.differentiable), config.patch(options):
        yield
