"""Modules that cannot be one graph run as they are, under co-execution."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from regraft.passes import Pass
from regraft.program import InputError, RegraftError
from regraft.runtime.coexec.function import Coexecuted, coexecute
from regraft.runtime.coexec.report import Report

FALLBACKS = ("coexecute", "error")

log = logging.getLogger("regraft")


class Uncaptured(RegraftError):
    """A model that cannot be one graph."""


@contextmanager
def capturing() -> Iterator[None]:
    """RegraftErrors become Uncaptured, but for inputs that do not fit."""
    try:
        yield
    except InputError:
        raise
    except RegraftError as error:
        raise Uncaptured(*error.args) from error.__cause__


def coexecuted(
    model: Any, passes: Sequence[Pass], example_inputs: Any, error: Uncaptured
) -> torch.nn.Module:
    """The module with its calls, and generate, under co-execution; ``report()`` tells of them.

    It shares all that the module has, attributes, weights and hooks, and is of its class. Raises
    the error where the module does not run on the examples either, and for passes.
    """
    if passes:
        names = ", ".join(type(item).__name__ for item in passes)
        raise RegraftError(f"{names} cannot be applied without one graph: {error}") from error
    if example_inputs is not None:
        _try(model, example_inputs, error)
    where = _where(model, error)
    log.warning("regraft: %s is not compiled but co-executed: %s%s", _name(model), error, where)
    return _twin(model)


def _where(model: Any, error: Uncaptured) -> str:
    """The line that stopped capture, where the message does not have it."""
    from regraft.frontends.module import failing_line

    if error.__cause__ is None or ".py:" in str(error):
        return ""
    return f", at {failing_line(model, error.__cause__)}"


def _try(model: torch.nn.Module, example_inputs: Any, error: Uncaptured) -> None:
    """Run a copy, weights shared, on copies of the examples: raises the error where that fails."""
    from regraft.frontends.module import arguments

    weights = {id(weight): weight for weight in model.parameters()}
    try:
        trial, inputs = copy.deepcopy(model, weights), copy.deepcopy(arguments(example_inputs))
    except Exception:  # it cannot be copied: its first call will tell
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trial(*inputs[0], **inputs[1])
    except Exception:
        raise error from error.__cause__


def _twin(model: torch.nn.Module) -> Any:
    base: Any = type(model)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base.__call__(self, *args, **kwargs)

    @functools.wraps(getattr(base, "generate", call))
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _share(base, self).generate(*args, **kwargs)

    call.__qualname__, generate.__qualname__ = base.__qualname__, f"{base.__qualname__}.generate"
    members: dict[str, Any] = {"__call__": coexecute(call), "__module__": base.__module__}
    if hasattr(base, "generate"):
        members["generate"] = coexecute(generate)
    functions = [item for item in members.values() if isinstance(item, Coexecuted)]

    def report(self: Any) -> Report:
        """What co-execution did in calls and in generate."""
        first, *others = sorted((f.report() for f in functions), key=lambda r: -r.calls)
        for other in others:
            first.join(other)
        return first

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RegraftError(f"{_name(self)} is co-executed and has no graph to save or export")

    for name in ("save", "export_onnx"):
        if not hasattr(base, name):
            members[name] = refuse
    return _share(type(base.__name__, (base,), {**members, "report": report}), model)


def _share(kind: Any, module: torch.nn.Module) -> Any:
    """Another object of this class with the very attributes of the module."""
    twin = kind.__new__(kind)
    object.__setattr__(twin, "__dict__", module.__dict__)
    return twin


def _name(model: Any) -> str:
    return type(model).__name__
