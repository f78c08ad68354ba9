"""Attention to a quantized cache by the kernel of its device, else by the reference."""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

from torch import Tensor

from regraft.kernels import compiled
from regraft.kernels.kvquant import reference
from regraft.kernels.kvquant.reference import Body

log = logging.getLogger("regraft")
MODULES = {"cpu": "regraft.kernels.kvquant.llvm", "cuda": "regraft.kernels.kvquant.cuda"}
_told: set[str] = set()


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
    arguments = q, body, exact_key, exact_value, exact_mask, first, sinks, scale
    if wanted():
        try:
            return kernel_attend(*arguments)
        except compiled.KernelError as error:
            if str(error) not in _told:
                _told.add(str(error))
                log.warning("regraft: decoding the quantized cache by reference, slower: %s", error)
    return reference.attend(*arguments)


def kernel_attend(q: Tensor, *arguments: Any) -> Tensor:
    """``attend`` by the kernel; KernelError where there is none."""
    return importlib.import_module(MODULES[q.device.type]).attend(q, *arguments)


def wanted() -> bool:
    return os.environ.get("REGRAFT_TVM") != "0"
