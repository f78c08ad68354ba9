"""Handlers of operators, by domain, name and the opset that their meaning dates from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

FAMILIES = (
    "attention", "casts", "control", "convolution", "elementwise", "image", "linear", "losses",
    "microsoft", "ml", "normalisation", "pooling", "quantisation", "random", "recurrent",
    "reduction", "regraft", "sequences", "shapes", "signal", "small", "strings", "training",
    "transformer", "trees",
)  # fmt: skip
_WIDE = (torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True)
class Operator:
    """function takes the inputs in order (None where absent) and the attributes as keywords.

    host: the inputs that it wants as flat lists of numbers; keywords: what it takes by name.
    """

    function: Callable[..., Any]
    host: frozenset[int]
    keywords: frozenset[str]
    any_keyword: bool
    raw: bool
    family: str


_handlers: dict[tuple[str, str], dict[int, Operator]] = {}
_on_host: dict[tuple[str, str], Callable[..., Any]] = {}


def operator(
    *names: str,
    since: int = 1,
    domain: str = "",
    host: tuple[int, ...] = (),
    widen: bool = False,
    raw: bool = False,
) -> Callable[[Callable], Callable]:
    """Register a handler. widen: unsigned integers that torch cannot compute with come as int64,
    and results of that type go back. raw: numbers on the host stay there.

    The keywords ``outputs`` (how many are wanted) and ``types`` (ONNX types of the inputs) are
    given to handlers that name them.
    """

    def register(function: Callable) -> Callable:
        call = _widened(function) if widen else function
        parameters = inspect.signature(function).parameters.values()
        keywords = frozenset(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL,))
        free = any(p.kind is p.VAR_KEYWORD for p in parameters)
        family = function.__module__.rsplit(".", 1)[-1]
        made = Operator(call, frozenset(host), keywords, free, raw, family)
        for name in names:
            _handlers.setdefault((domain, name), {})[since] = made
        return function

    return register


def on_host(*names: str) -> Callable[[Callable], Callable]:
    """Register what computes an operator when all inputs are Host; None: the handler must."""

    def register(function: Callable) -> Callable:
        for name in names:
            _on_host["", name] = function
        return function

    return register


def handler(domain: str, name: str, version: int) -> Operator | None:
    """The handler of an operator at an opset version."""
    load()
    known = _handlers.get((domain, name), {})
    return known.get(max((since for since in known if since <= version), default=0))


def host_handler(domain: str, name: str) -> Callable[..., Any] | None:
    load()
    return _on_host.get((domain, name))


def names(domain: str) -> list[str]:
    """The operators of a domain that have a handler."""
    load()
    return sorted(name for owner, name in _handlers if owner == domain)


def load() -> None:
    if not _handlers:
        for family in FAMILIES:
            import_module(f"regraft.frontends.onnx.operators.{family}")


def _widened(function: Callable) -> Callable:
    def call(*inputs: Any, **attributes: Any) -> Any:
        wide = next((x.dtype for x in inputs if torch.is_tensor(x) and x.dtype in _WIDE), None)
        if wide is None:
            return function(*inputs, **attributes)
        changed = [
            x.to(torch.int64) if torch.is_tensor(x) and x.dtype in _WIDE else x for x in inputs
        ]
        result = function(*changed, **attributes)
        if isinstance(result, (tuple, list)):
            return type(result)(_narrow(r, wide) for r in result)
        return _narrow(result, wide)

    return call


def _narrow(value: Any, dtype: torch.dtype) -> Any:
    same = torch.is_tensor(value) and value.dtype == torch.int64
    return value.to(dtype) if same else value
