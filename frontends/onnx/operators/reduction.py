"""Reductions, arg reductions, top k, cumulative operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regraft.frontends.onnx.registry import operator


def _sum(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return torch.sum(x, dims, keepdim=keep, dtype=x.dtype)


def _prod(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in sorted(dims, reverse=True):
        x = torch.prod(x, dim, keepdim=keep, dtype=x.dtype)
    return x


def _mean(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, dims, keepdim=keep)
    count = math.prod(x.shape[d] for d in dims)
    return torch.div(_sum(x, dims, keep), count, rounding_mode="trunc")


def _log_sum_exp(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    wide = x if x.is_floating_point() else x.double()
    return torch.logsumexp(wide, dims, keepdim=keep).to(x.dtype)


def _extreme(name: str) -> Callable[[Tensor, list[int], bool], Tensor]:
    function = getattr(torch, name)

    def reduce(x: Tensor, dims: list[int], keep: bool) -> Tensor:
        if any(isinstance(x.shape[d], int) and x.shape[d] == 0 for d in dims):
            sizes = [1 if d in dims else n for d, n in enumerate(x.shape)]
            shown = [n for d, n in enumerate(sizes) if keep or d not in dims]
            return torch.full(shown, _empty(x.dtype, name), dtype=x.dtype, device=x.device)
        return function(x, dims, keepdim=keep)

    return reduce


def _empty(dtype: torch.dtype, name: str) -> Any:
    if dtype == torch.bool:
        return name == "amin"
    if dtype.is_floating_point:
        return -math.inf if name == "amax" else math.inf
    info = torch.iinfo(dtype)
    return info.min if name == "amax" else info.max


_REDUCE: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceSum": _sum,
    "ReduceProd": _prod,
    "ReduceMean": _mean,
    "ReduceMax": _extreme("amax"),
    "ReduceMin": _extreme("amin"),
    "ReduceL1": lambda x, dims, keep: _sum(x.abs(), dims, keep),
    "ReduceL2": lambda x, dims, keep: _root(_sum(x * x, dims, keep)),
    "ReduceSumSquare": lambda x, dims, keep: _sum(x * x, dims, keep),
    "ReduceLogSum": lambda x, dims, keep: _like(_sum(x, dims, keep), torch.log),
    "ReduceLogSumExp": _log_sum_exp,
}


def _root(x: Tensor) -> Tensor:
    return _like(x, torch.sqrt)


def _like(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return function(x if x.is_floating_point() else x.double()).to(x.dtype)


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor], name: str) -> Callable:
    def reduce(x, axes=None, *, keepdims=1, noop_with_empty_axes=0):
        if not axes and noop_with_empty_axes:
            return function(x.unsqueeze(0), [0], False) if "Square" in name else x
        dims = [axis % x.dim() for axis in axes] if axes else list(range(x.dim()))
        if not dims:
            return function(x.unsqueeze(0), [0], False)
        return function(x, dims, bool(keepdims))

    return reduce


for _name, _function in _REDUCE.items():
    operator(_name, host=(1,), widen=True)(_reduction(_function, _name))


def _arg(function: Callable[..., Tensor]) -> Callable:
    def find(x, *, axis=0, keepdims=1, select_last_index=0):
        if not select_last_index:
            return function(x, axis, keepdim=bool(keepdims))
        last = x.shape[axis] - 1
        return last - function(x.flip(axis), axis, keepdim=bool(keepdims))

    return find


operator("ArgMax")(_arg(torch.argmax))
operator("ArgMin")(_arg(torch.argmin))


@operator("TopK", host=(1,))
def top_k(x, k, *, axis=-1, largest=1, sorted=1):
    count = k[0] if isinstance(k, (list, tuple)) else k
    wide = x.to(torch.int64) if x.dtype in (torch.uint16, torch.uint32, torch.uint64) else x
    # stable: of equal values the one of the smaller index comes first
    values, indices = torch.sort(wide, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, count).to(x.dtype), indices.narrow(axis, 0, count)


def _cumulative(function: Callable[..., Tensor], start: int) -> Callable:
    def accumulate(x, axis, *, exclusive=0, reverse=0):
        dim = axis[0]
        x = x.flip(dim) if reverse else x
        if exclusive:
            first = torch.full_like(x.narrow(dim, 0, 1), start)
            x = torch.cat([first, x.narrow(dim, 0, x.shape[dim] - 1)], dim)
        made = function(x, dim).to(x.dtype)
        return made.flip(dim) if reverse else made

    return accumulate


operator("CumSum", host=(1,), widen=True)(_cumulative(torch.cumsum, 0))
operator("CumProd", host=(1,), widen=True)(_cumulative(torch.cumprod, 1))
