"""Products that C++ calls by itself, see ``direct.cpp``: those that Python checked and ran once."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.kernels.compiled import KernelError, entry, native
from regraft.kernels.linear.formats import parse

SOURCE = Path(__file__).with_name("direct.cpp")
log = logging.getLogger("regraft")
_lock = threading.Lock()
_known: set[tuple[Any, ...]] = set()


def learn(
    x: Tensor, packed: Tensor, bias: Tensor | None, format: str, rows: int, tile: int, function: Any
) -> None:
    """x [n, columns] times packed weights [rows, columns] has run, tile rows of x at once."""
    key = (format, *x.shape, rows, *packed.shape, int(bias is not None), tile, parse(format).block)
    if key in _known:
        return
    with _lock:
        address, library = entry(function), _library()
        if key not in _known and address and library:
            numbers = (ctypes.c_int64 * len(key[1:]))(*key[1:])
            library.direct_learn(format.encode(), numbers, ctypes.c_void_p(address))
        _known.add(key)


@contextmanager
def paused() -> Iterator[None]:
    """All calls go to Python in the block, those of other threads too."""
    library = _library()
    if library is None:
        yield
        return
    library.direct_pause(1)
    try:
        yield
    finally:
        library.direct_pause(-1)


def served() -> int:
    """Calls that did not go to Python."""
    library = _library()
    return 0 if library is None else library.direct_served()


@cache
def _library() -> Any:
    """None where it cannot be made: Python then calls the kernels, slower."""
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        library = native(SOURCE, torch_cpu)
        library.direct_served.restype = ctypes.c_int64
        if library.direct_start():
            return library
    except (KernelError, OSError) as error:
        log.debug("packed linear layers are called from Python", exc_info=error)
    return None
