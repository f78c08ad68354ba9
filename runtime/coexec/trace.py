"""A stretch as a function of tensors that torch can trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from regraft.runtime.coexec.stretch import Entry, Plan, Unfit

_LAYOUTS = (torch.strided, torch.sparse_coo)
_MEMORY_FORMATS = (
    torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d
)  # fmt: skip


@dataclass(frozen=True)
class Ref:
    """A tensor, by its number."""

    number: int


@dataclass(frozen=True)
class Varying:
    """A number that is given, by its place among those."""

    place: int


@dataclass(frozen=True)
class Call:
    op: Any
    args: tuple[Any, ...]
    grad: bool
    outs: tuple[Ref | None, ...]


@dataclass(frozen=True)
class Gradients:
    roots: tuple[Ref, ...]
    seeds: tuple[Ref, ...]
    leaves: tuple[Ref, ...]
    sums: tuple[Ref | None, ...]
    outs: tuple[Ref | None, ...]
    strides: tuple[tuple[int, ...] | None, ...]


class Traced:
    """Called with the inputs of a plan, gives its outputs."""

    def __init__(self, found: Plan) -> None:
        self._refs = {id(x): Ref(n) for n, x in enumerate(found.tensors)}
        self.varying = found.varying
        self.inputs = len(found.tensors)
        self.differentiable = found.differentiable
        before = set(found.first)
        self.random = any(x.random for e, x in enumerate(found.entries) if e not in before)
        self.passes = [e for e, entry in enumerate(found.entries) if entry.backward]
        self.length = len(found.entries)
        self._calls = {
            e: self._gradients(entry) if entry.backward else self._call(e, entry, found)
            for e, entry in enumerate(found.entries)
            if e not in before
        }
        self._outputs = [self._ref(found.entries[e].outs[r]) for e, r in found.outputs]
        self._refs.clear()

    def signature(self) -> str:
        return f"{list(self._calls.values())} {self._outputs} {len(self.varying)}"

    def __call__(self, *given: Tensor) -> list[Tensor]:
        values: dict[int, Tensor] = dict(enumerate(given[: self.inputs]))
        numbers = given[-1] if self.varying else None
        for e, call in self._calls.items():
            if isinstance(call, Gradients):
                _differentiate(call, values)
            else:
                with torch.set_grad_enabled(call.grad):
                    args = [_value(arg, values, numbers) for arg in call.args]
                    result = _apply(call.op, args)
                _store(result, call.outs, values, detach=self.differentiable and not call.grad)
            _mark(e)
        results = [values[out.number] for out in self._outputs]
        results = results if self.differentiable else [x.detach() for x in results]
        _mark(self.length - 1)
        return results

    @property
    def entries(self) -> list[int]:
        """Those that it calls."""
        return list(self._calls)

    def end(self, calls: int) -> int:
        """The entry after so many calls; after all of them the end of the stretch."""
        return self.length if calls == len(self._calls) else self.entries[calls - 1] + 1

    def _ref(self, x: Tensor | None) -> Any:
        if x is None:
            return None
        return self._refs.setdefault(id(x), Ref(len(self._refs)))

    def _gradients(self, entry: Entry) -> Gradients:
        job = entry.backward
        assert job is not None
        roots, seeds, leaves, sums, outs = (
            tuple(map(self._ref, tensors))
            for tensors in (job.roots, job.seeds, job.leaves, job.sums, entry.outs)
        )
        strides = tuple(None if out is None else out.stride() for out in entry.outs)
        return Gradients(roots, seeds, leaves, sums, outs, strides)

    def _call(self, e: int, entry: Entry, found: Plan) -> Call:
        args = []
        for a, (argument, value) in enumerate(
            zip(entry.op._schema.arguments, entry.args, strict=True)
        ):
            kind = str(argument.real_type)
            if isinstance(value, int) and "Layout" in kind:
                value = _LAYOUTS[value]
            elif isinstance(value, int) and "MemoryFormat" in kind:
                value = _MEMORY_FORMATS[value]
            args.append(self._argument(value, (e, a), found))
        return Call(entry.op, tuple(args), entry.grad, tuple(map(self._ref, entry.outs)))

    def _argument(self, value: Any, where: tuple[int, int], found: Plan, item: int = -1) -> Any:
        known = found.numbers.get((*where, item))
        if known is not None:
            number, constant, varies = known
            if varies:
                return Varying(self.varying.index(number))
            return constant if isinstance(value, Tensor) else value
        if isinstance(value, Tensor):
            return self._ref(value)
        if isinstance(value, list):
            return [self._argument(x, where, found, i) for i, x in enumerate(value)]
        return value


def _mark(e: int) -> None:
    """Nodes that were traced since the last mark are of this entry."""
    mode = get_proxy_mode()
    if mode is None:
        return
    for node in reversed(mode.tracer.graph.nodes):
        if node.op == "placeholder" or "entry" in node.meta:
            break
        node.meta["entry"] = e


def _value(arg: Any, values: dict[int, Tensor], numbers: Tensor | None) -> Any:
    if isinstance(arg, Ref):
        return values[arg.number]
    if isinstance(arg, Varying):
        assert numbers is not None
        return Number(numbers[arg.place])
    if isinstance(arg, list):
        return [_value(x, values, numbers) for x in arg]
    return arg


def _store(
    result: Any, outs: tuple[Ref | None, ...], values: dict[int, Tensor], detach: bool
) -> None:
    flat = [x for value in (result if isinstance(result, tuple | list) else (result,))
            for x in (value if isinstance(value, tuple | list) else (value,))]  # fmt: skip
    for out, x in zip(outs, flat if outs else (), strict=True):
        if out is not None:
            values[out.number] = x.detach() if detach else x


def _differentiate(call: Gradients, values: dict[int, Tensor]) -> None:
    def all_of(refs: tuple[Ref, ...]) -> list[Tensor]:
        return [values[ref.number] for ref in refs]

    with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
        grads = torch.autograd.grad(
            all_of(call.roots), all_of(call.leaves), all_of(call.seeds), retain_graph=True
        )
    seen: set[int] = set()
    with torch.no_grad():
        for grad, total, out, stride in zip(grads, call.sums, call.outs, call.strides, strict=True):
            if total is not None:
                values[total.number].add_(grad)
                continue
            assert out is not None and stride is not None
            if grad.stride() != stride:
                grad = torch.empty_strided(
                    grad.shape, stride, dtype=grad.dtype, device=grad.device
                ).copy_(grad)
            elif id(grad) in seen:
                grad = grad.clone()
            seen.add(id(grad))
            values[out.number] = grad


class Number:
    """Stands for a number among the arguments of an operator."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _apply(op: Any, args: list[Any]) -> Any:
    given = [x for arg in args for x in (arg if isinstance(arg, list) else (arg,))]
    if any(isinstance(x, Number) for x in given):
        if op._schema.name.startswith("aten::_foreach_"):
            return _each(op, args)
        op, args = _with_tensors(op, args)
    schema = op._schema.arguments
    names = {
        argument.name: value
        for argument, value in zip(schema, args, strict=True)
        if argument.kwarg_only
    }
    return op(*args[: len(args) - len(names)], **names)


def _each(op: Any, args: list[Any]) -> list[Any]:
    """An operator on lists, item by item."""
    packet = getattr(torch.ops.aten, op._schema.name.removeprefix("aten::_foreach_"))
    overload = {"List": "Tensor", "Scalar": "Scalar", "ScalarList": "Scalar"}
    name = overload.get(op._schema.overload_name, "")
    one = getattr(packet, name if name in packet.overloads() else "default")
    rows = [[arg[i] if isinstance(arg, list) else arg for arg in args] for i in range(len(args[0]))]
    return [_apply(one, row) for row in rows]


def _with_tensors(op: Any, args: list[Any]) -> tuple[Any, list[Any]]:
    """The operator for numbers given as tensors."""
    name = op._schema.name.split("::")[1]
    rewrite = _REWRITES.get(name.rstrip("_"))
    if rewrite is not None:
        args = rewrite(*args)
    if any(isinstance(arg, Number) for arg in args):
        overload = {"Scalar": "Tensor", "Tensor": "Tensor", "Tensor_Scalar": "Tensor_Tensor"}
        new = overload.get(op._schema.overload_name)
        packet = op.overloadpacket
        if new is None or new not in packet.overloads():
            raise Unfit(f"a number given to {name} changes")
        op = getattr(packet, new)
        args = [arg.tensor if isinstance(arg, Number) else arg for arg in args]
        args = args[: len(op._schema.arguments)]
    return op, args


def _scaled(x: Any, other: Any, alpha: Any) -> list[Any]:
    if isinstance(alpha, Number):
        other, alpha = other * alpha.tensor, 1
    return [x, other, alpha]


def _scaled_pair(x: Any, first: Any, second: Any, value: Any) -> list[Any]:
    if isinstance(value, Number):
        first, value = first * value.tensor, 1
    return [x, first, second, value]


def _weighted(x: Any, end: Any, weight: Any) -> list[Any]:
    return [x, end, Number(weight.tensor.to(x.dtype))]


_REWRITES: dict[str, Callable[..., list[Any]]] = {
    "add": _scaled,
    "sub": _scaled,
    "addcmul": _scaled_pair,
    "addcdiv": _scaled_pair,
    "lerp": _weighted,
}
