"""Small numbers on the host: sizes and what is computed from them stay symbolic in a trace."""

from __future__ import annotations

import math
import operator as python
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from regraft.frontends.onnx.registry import on_host
from regraft.frontends.onnx.values import DTYPES, SMALL, Host

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _made(values: Any, dtype: Any) -> Host | None:
    array = np.asarray(values, dtype=object)
    if dtype is str:
        return Host(array, dtype)
    if array.size > SMALL and dtype is not torch.bool:
        return None
    fit = np.empty(array.size, dtype=object)
    for i, value in enumerate(array.ravel()):
        fit[i] = _fit(value, dtype)
    return Host(fit.reshape(array.shape), dtype)


def _fit(value: Any, dtype: torch.dtype) -> Any:
    """A number as the type holds it."""
    if isinstance(value, _SYMBOLIC):
        return value
    if dtype == torch.bool:
        return bool(value)
    if dtype.is_floating_point:
        return float(np.float32(value)) if dtype == torch.float32 else float(value)
    info = torch.iinfo(dtype)
    return (int(value) - info.min) % (info.max - info.min + 1) + info.min


def _moved(x: Host, values: Any) -> Host:
    return Host(np.asarray(values, dtype=object), x.dtype)


def _divide(a: Any, b: Any) -> Any:
    if isinstance(a, (float, torch.SymFloat)) or isinstance(b, float):
        return a / b if not isinstance(b, float) or b else math.copysign(math.inf, a)
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return a // b


_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "Add": python.add,
    "Sub": python.sub,
    "Mul": python.mul,
    "Div": _divide,
    "Mod": python.mod,
    "Max": lambda a, b: torch.sym_max(a, b),
    "Min": lambda a, b: torch.sym_min(a, b),
}
_LOGIC: dict[str, Callable[[Any, Any], Any]] = {
    "Equal": python.eq,
    "Greater": python.gt,
    "GreaterOrEqual": python.ge,
    "Less": python.lt,
    "LessOrEqual": python.le,
    "And": lambda a, b: bool(a) and bool(b),
    "Or": lambda a, b: bool(a) or bool(b),
}


def _pairwise(function: Callable[[Any, Any], Any], logic: bool) -> Callable[..., Host | None]:
    def compute(*inputs: Host, fmod: int = 0) -> Host | None:
        first = inputs[0]
        if fmod or len(inputs) < 2 or any(x.dtype is not first.dtype for x in inputs):
            return None
        if first.dtype is str:
            return _made(first.values == inputs[1].values, torch.bool) if logic else None
        if not _computes(first.dtype):
            return None
        values = inputs[0].values
        for other in inputs[1:]:
            values = np.frompyfunc(function, 2, 1)(values, other.values)
        if logic:
            values = np.frompyfunc(bool, 1, 1)(values)
        return _made(values, torch.bool if logic else first.dtype)

    return compute


def _computes(dtype: torch.dtype) -> bool:
    return dtype in (torch.int64, torch.int32, torch.bool, torch.float32, torch.float64)


for _name, _function in _ARITHMETIC.items():
    on_host(_name)(_pairwise(_function, False))
for _name, _function in _LOGIC.items():
    on_host(_name)(_pairwise(_function, True))


@on_host("Neg")
def neg(x: Host) -> Host | None:
    return _made(-x.values, x.dtype) if _computes(x.dtype) and x.dtype != torch.bool else None


@on_host("Not")
def _not(x: Host) -> Host | None:
    return _made(np.frompyfunc(lambda v: not v, 1, 1)(x.values), torch.bool)


def _each(function: Callable[[Any], Any]) -> Callable[[Host], Host | None]:
    def compute(x: Host) -> Host | None:
        if x.dtype is str or not _computes(x.dtype):
            return None
        return _made(np.frompyfunc(function, 1, 1)(x.values), x.dtype)

    return compute


def _floor(value: Any) -> Any:
    symbolic = isinstance(value, _SYMBOLIC)
    return torch.sym_float(math.floor(value)) if symbolic else value // 1


_SINGLE: dict[str, Any] = {
    "Neg": python.neg,
    "Abs": abs,
    "Floor": _floor,
    "Ceil": lambda value: -_floor(-value),
}
for _name, _one in _SINGLE.items():
    on_host(_name)(_each(_one))


@on_host("Cast")
def _cast(x: Host, *, to: int, **_: Any) -> Host | None:
    dtype = DTYPES.get(to)
    if x.dtype is str or dtype is None or not _computes(dtype) or not _computes(x.dtype):
        return None
    if dtype.is_floating_point:
        values = np.frompyfunc(torch.sym_float, 1, 1)(x.values)
    elif dtype == torch.bool:
        values = np.frompyfunc(bool, 1, 1)(x.values)
    elif any(isinstance(v, float) and not math.isfinite(v) for v in x.numbers()):
        return None
    else:
        values = np.frompyfunc(torch.sym_int, 1, 1)(x.values)
    return _made(values, dtype)


@on_host("Where")
def _where(condition: Host, a: Host, b: Host) -> Host | None:
    if a.dtype is not b.dtype:
        return None
    chosen = np.frompyfunc(lambda c, x, y: x if c else y, 3, 1)
    return _made(chosen(condition.values, a.values, b.values), a.dtype)


def _integers(x: Host | None) -> list[int] | None:
    if x is None:
        return None
    numbers = x.numbers()
    return numbers if all(isinstance(n, int) for n in numbers) else None


@on_host("Gather")
def _gather(x: Host, indices: Host, *, axis: int = 0) -> Host | None:
    if _integers(indices) is None:
        return None
    return _moved(x, np.take(x.values, indices.values.astype(np.int64), axis))


@on_host("Slice")
def _slice(x: Host, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Host | None:
    given = [v for v in (starts, ends, axes, steps) if isinstance(v, Host)]
    if any(_integers(v) is None for v in given):
        return None
    starts, ends, axes, steps = (
        v.numbers() if isinstance(v, Host) else v for v in (starts, ends, axes, steps)
    )
    values = x.values
    parts = zip(axes or range(len(starts)), starts, ends, steps or [1] * len(starts), strict=True)
    for axis, start, end, step in parts:
        index: list[Any] = [slice(None)] * values.ndim
        index[axis] = slice(start, None if step < 0 and end < -values.shape[axis] else end, step)
        values = values[tuple(index)]
    return _moved(x, values)


@on_host("Concat")
def _concat(*inputs: Host, axis: int = 1) -> Host:
    return _moved(inputs[0], np.concatenate([x.values for x in inputs], axis))


@on_host("Unsqueeze")
def _unsqueeze(x: Host, axes: Any) -> Host | None:
    axes = axes.numbers() if isinstance(axes, Host) else axes
    return _moved(x, np.expand_dims(x.values, tuple(axes)))


@on_host("Squeeze")
def _squeeze(x: Host, axes: Any = None) -> Host | None:
    axes = axes.numbers() if isinstance(axes, Host) else axes
    return _moved(x, np.squeeze(x.values, tuple(axes) if axes else None))


@on_host("Transpose")
def _transpose(x: Host, *, perm: Any = None) -> Host:
    return _moved(x, x.values.transpose(tuple(perm) if perm else None))


@on_host("Reshape")
def _reshape(x: Host, shape: Any, *, allowzero: int = 0) -> Host | None:
    sizes = _integers(shape) if isinstance(shape, Host) else shape
    if sizes is None:
        return None
    if not allowzero:
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return _moved(x, x.values.reshape(sizes))


@on_host("Expand")
def _expand(x: Host, shape: Host) -> Host | None:
    sizes = _integers(shape)
    if sizes is None or math.prod(sizes) > SMALL:
        return None
    return _moved(x, np.broadcast_to(x.values, np.broadcast_shapes(x.shape, tuple(sizes))))


@on_host("Split")
def _split(x: Host, split: Any = None, *, axis: int = 0, outputs: int, **_: Any) -> Any:
    sizes = _integers(split) if isinstance(split, Host) else split
    if sizes is None:
        return None
    parts = np.split(x.values, np.cumsum(sizes)[:-1], axis)
    return tuple(_moved(x, part) for part in parts)


def _reduced(function: Callable[[Any, Any], Any]) -> Callable[..., Host | None]:
    def compute(x: Host, axes: Any = None, *, keepdims: int = 1, **_: Any) -> Host | None:
        axes = axes.numbers() if isinstance(axes, Host) else axes
        if x.values.ndim != 1 or not x.values.size or (axes and list(axes) not in ([0], [-1])):
            return None
        if x.dtype not in (torch.int64, torch.int32):
            return None
        total = x.values[0]
        for value in x.values[1:]:
            total = function(total, value)
        return _made([total] if keepdims else total, x.dtype)

    return compute


for _name, _pair in {
    "ReduceProd": python.mul,
    "ReduceSum": python.add,
    "ReduceMax": torch.sym_max,
    "ReduceMin": torch.sym_min,
}.items():
    on_host(_name)(_reduced(_pair))


@on_host("Range")
def _range(start: Host, limit: Host, delta: Host, **_: Any) -> Host | None:
    numbers = [*start.numbers(), *limit.numbers(), *delta.numbers()]
    if not all(isinstance(n, int) for n in numbers) or not numbers[2]:
        return None
    values = range(*numbers)
    return _made(list(values), start.dtype) if len(values) <= SMALL else None
