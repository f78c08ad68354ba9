"""Modules whose control flow depends on data stay one operator of the graph.

Capture cannot follow ``for expert in chosen.nonzero()``: the number of turns is known only when
the model runs. Such a module is called as it is, by ``regraft::module``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from itertools import count

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    PendingUnbackedSymbolNotFound,
)
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from regraft.kernels import ops
from regraft.program import Program, RegraftError

DATA_DEPENDENT = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    PendingUnbackedSymbolNotFound,
)
_numbers = count()


class _Call:
    """Runs a module on the tensors among its arguments."""

    def __init__(self, module: torch.nn.Module, spec: TreeSpec) -> None:
        self.module, self.spec = module, spec

    def __call__(self, *inputs: Tensor) -> Tensor:
        args, kwargs = tree_unflatten(inputs, self.spec)
        output = self.module(*args, **kwargs)
        if not torch.is_tensor(output) or output.shape != inputs[0].shape:
            raise RegraftError(
                f"{type(self.module).__name__} depends on data and does not keep the shape of "
                "its input: it cannot be captured"
            )
        return output


class _Opaque(torch.nn.Module):
    """Stands for a module that maps tensors to one tensor of the shape of the first."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module, self.number = module, next(_numbers)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args, **kwargs) -> Tensor:
        inputs, spec = tree_flatten((args, kwargs))
        if not all(torch.is_tensor(x) for x in inputs):
            raise RegraftError(f"{type(self.module).__name__} takes more than tensors")
        self.call = ops.modules[self.number] = _Call(self.module, spec)
        return torch.ops.regraft.module(inputs, self.number)


def around_data(model: torch.nn.Module, attempt: Callable[[], Program]) -> Program:
    """The program of attempt(), with the modules that stop it as operators.

    The program's metadata keeps those modules. Raises the attempt's RegraftError when no module
    of the model is to blame.
    """
    kinds: set[type] = set()
    first: RegraftError | None = None
    while True:
        with _opaque(model, kinds) as modules:
            try:
                program = attempt()
            except RegraftError as error:
                kind = _blamed(error.__cause__)
                first = first or error
                if kind is None or kind in kinds:
                    raise first from first.__cause__
                kinds.add(kind)
                continue
        if modules:
            program.metadata["modules"] = modules
        return program


@contextmanager
def _opaque(model: torch.nn.Module, kinds: set[type]):
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) in kinds
    ]
    modules = [_Opaque(child) for _, _, child in places]
    try:
        for (parent, name, _), module in zip(places, modules, strict=True):
            parent._modules[name] = module
        yield modules
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def _blamed(error: BaseException | None) -> type | None:
    """The class of the innermost module that was running when capture met unknown data."""
    if not isinstance(error, DATA_DEPENDENT):
        return None
    kind, trace = None, error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module) and not isinstance(owner, torch.fx.GraphModule):
            kind = type(owner)
        trace = trace.tb_next
    return kind
