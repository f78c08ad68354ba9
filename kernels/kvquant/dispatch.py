"""Quantized caches by the kernels of their device, else by the reference."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from regraft.kernels.compiled import KernelError, tell, wanted
from regraft.kernels.kvquant import reference
from regraft.kernels.kvquant.reference import Body, Packed

MODULES = {"cpu": "regraft.kernels.kvquant.llvm", "cuda": "regraft.kernels.kvquant.cuda"}


def attend(
    q: Tensor,
    body: Body,
    exact_key: Tensor,
    exact_value: Tensor,
    exact_mask: Tensor,
    first: Tensor,
    sinks: Tensor,
    scale: float,
) -> Tensor:
    """The reference's ``attend`` by a TVM kernel; where there is none, by the reference, with one
    notice. REGRAFT_TVM=0 asks for the reference."""
    arguments = (q, body, exact_key, exact_value, exact_mask, first, sinks, scale)
    return _first_of("attend", q.device.type, arguments)


def quantize(kind: str, x: Tensor, *arguments: Any) -> Packed:
    """The reference's ``quantize`` by a TVM kernel, as ``attend``."""
    return _first_of("quantize", x.device.type, (kind, x, *arguments))


def _first_of(name: str, device: str, arguments: tuple[Any, ...]) -> Any:
    if wanted() and (kernel := getattr(kernels_of(device), name, None)):
        try:
            return kernel(*arguments)
        except KernelError as error:
            tell("quantized caches run by reference, slower", error)
    return getattr(reference, name)(*arguments)


def kernels_of(device: str) -> Any:
    """The module with a device's ``attend``, and ``quantize`` where it has one."""
    return importlib.import_module(MODULES[device])
