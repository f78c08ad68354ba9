"""What reads or hands out a tensor's memory past torch's dispatcher waits for its value first.

The wrappers are put in place once, at the first use of co-execution in a process; where nothing is
on a tape each costs a call.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._device import _device_constructors

DEFERRED, RECORD, EAGER = range(3)
_inside = threading.local()  # a wrapper is at work on this thread

# read the data
_VALUES = ("tolist", "__repr__", "__format__", "__reduce_ex__", "__deepcopy__", "__setstate__")
# hand out the memory, arrays for as long as they live
_ARRAYS = ("numpy", "__array__", "__dlpack__")
_MEMORY = ("data_ptr", "untyped_storage", "_typed_storage", "storage", "share_memory_",
           "_make_subclass", "set_")  # fmt: skip
# depend on what autograd knows of the tensor
_AUTOGRAD = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad", "is_shared",
             "storage_offset", "_is_view", "requires_grad_")  # fmt: skip
_PROPERTIES = ("grad_fn", "is_leaf", "_version", "_base", "data", "output_nr", "retains_grad")
# settings that operators on the tape must not see before their turn, of torch and of torch._C
_SETTINGS = ("set_num_threads", "set_flush_denormal", "save", "to_dlpack")
_BACKENDS = re.compile(
    "_set_.*(sdp|mkldnn|onednn|nnpack|cudnn|blas|linalg|deterministic|float32|fp32|cpu_allow|dtype)"
)
# streams that operators on the tape are to run on, and waits for what they do
_CUDA = re.compile("_cuda_(synchronize|setStream|setDevice|exchangeDevice|beginAllocate.*)")
_CUDA_METHODS = (
    ("Stream", ("synchronize", "query", "wait_stream", "wait_event", "record_event")),
    ("Event", ("record", "wait", "synchronize", "query")),
    ("CUDAGraph", ("capture_begin", "capture_end", "replay")),
)
# what other threads are told or given may be what the tape has yet to write
_HANDOVERS = (
    (threading.Thread, "start"),
    (threading.Condition, "notify"),
    (concurrent.futures.ThreadPoolExecutor, "submit"),
)
# make tensors by writing to memory directly
_MAKERS = ("tensor", "as_tensor", "from_numpy", "frombuffer", "asarray", "from_dlpack")


@cache
def install(ext: Any) -> None:
    _device_constructors()  # ``with torch.device(...)`` is to know the makers as they were
    for name in (*_VALUES, *_ARRAYS, *_MEMORY, *_AUTOGRAD):
        _wrap_method(ext, name)
    for name in _PROPERTIES:
        _wrap_property(ext, name)
    for name in _SETTINGS:
        _wrap_function(ext, torch, name, waits=True)
    for name in filter(_BACKENDS.match, dir(torch._C)):
        _wrap_function(ext, torch._C, name, waits=True)
    if torch.cuda.is_available():
        _install_cuda(ext)
    for owner, name in _HANDOVERS:
        _wrap_handover(ext, owner, name)
    for name in _MAKERS:
        _wrap_function(ext, torch, name, waits=False)
    torch.random.default_generator = _Generator(ext, torch.random.default_generator)  # type: ignore[assignment]
    _wrap_backward(ext)
    _wrap_apply(ext)
    _wrap_dual(ext)
    os.register_at_fork(
        before=ext.before_fork,
        after_in_parent=ext.after_fork_in_parent,
        after_in_child=ext.after_fork_in_child,
    )


def _install_cuda(ext: Any) -> None:
    for name in filter(_CUDA.match, dir(torch._C)):
        _wrap_function(ext, torch._C, name, waits=True)
    put = torch.cuda.set_rng_state

    @functools.wraps(put)
    def set_rng_state(*args: Any, **kwargs: Any) -> None:
        (_puts_back_nothing if getattr(_inside, "compiling", False) else put)(*args, **kwargs)

    torch.cuda.set_rng_state = set_rng_state
    for owner, names in _CUDA_METHODS:
        for name in names:
            _wrap_handover(ext, getattr(torch.cuda, owner), name)


def _quiet(ext: Any, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call with the interceptor off."""
    on, outer = ext.suspend(), getattr(_inside, "yes", False)
    _inside.yes = True
    try:
        return original(*args, **kwargs)
    finally:
        _inside.yes = outer
        ext.resume(on)


@contextmanager
def quietly() -> Iterator[None]:
    """No wrapper of this thread waits in the block."""
    outer, _inside.yes = getattr(_inside, "yes", False), True
    try:
        yield
    finally:
        _inside.yes = outer


@contextmanager
def compiling() -> Iterator[None]:
    """In the block, which traces beside the program, no random state is put back: compilers do so
    with the state from before, but meanwhile the program drew on it."""
    with quietly():
        _inside.compiling = True
        try:
            yield
        finally:
            _inside.compiling = False


def _puts_back_nothing(*args: Any, **kwargs: Any) -> None:
    """In place of what sets a random state."""


def _wrap_method(ext: Any, name: str) -> None:
    original = getattr(torch.Tensor, name)
    array, memory, taints = name in _ARRAYS, name in _MEMORY, name in _AUTOGRAD

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        if getattr(_inside, "yes", False):
            return original(*args, **kwargs)
        tensor = next((a for a in args[:2] if isinstance(a, torch.Tensor)), None)
        ext.sync(tensor)
        if taints:
            ext.taint()
        active = ext.active()
        result = _quiet(ext, original, args, kwargs)
        if tensor is not None and (array or (memory and active)):
            _hand_out(ext, tensor, result)
        return result

    static = isinstance(torch.Tensor.__dict__.get(name), staticmethod) or name == "_make_subclass"
    setattr(torch.Tensor, name, staticmethod(method) if static else method)


def _hand_out(ext: Any, tensor: torch.Tensor, result: Any) -> None:
    """From now on others may read and write the tensor's memory, for as long as an array lives."""
    if isinstance(result, torch.Tensor) or tensor.layout != torch.strided:
        return
    storage = ext.escape(tensor)
    if type(result).__name__ == "ndarray":
        weakref.finalize(result, ext.give_back, storage).atexit = False


def _wrap_property(ext: Any, name: str) -> None:
    original = getattr(torch.Tensor, name)
    taints = name == "grad_fn"

    def get(self: torch.Tensor) -> Any:
        if ext.active() or ext.is_pending(self):
            ext.sync(self)
        found = _quiet(ext, original.__get__, (self,), {})
        if taints and found is not None:
            ext.taint()
        return found

    def put(self: torch.Tensor, value: Any) -> None:
        ext.sync(self)
        if isinstance(value, torch.Tensor):
            ext.sync(value)
        ext.taint()
        _quiet(ext, original.__set__, (self, value), {})

    setattr(torch.Tensor, name, property(get, put, doc=original.__doc__))


def _wrap_function(ext: Any, module: Any, name: str, waits: bool) -> None:
    original = getattr(module, name)

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        if waits:
            ext.sync()
            if name == "set_num_threads":
                ext.stop_workers()
        return _quiet(ext, original, args, kwargs) if ext.active() else original(*args, **kwargs)

    setattr(module, name, function)


def _wrap_handover(ext: Any, owner: Any, name: str) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        if ext.active():
            ext.sync()
        return original(*args, **kwargs)

    setattr(owner, name, method)


class _Generator:
    """The default generator as torch.random's functions see it: what draws on it comes first."""

    def __init__(self, ext: Any, generator: torch.Generator) -> None:
        self._ext, self._generator = ext, generator

    def __getattr__(self, name: str) -> Any:
        if getattr(_inside, "compiling", False):
            if name in ("set_state", "manual_seed", "seed"):
                return _puts_back_nothing
            return getattr(self._generator, name)
        self._ext.sync()
        return getattr(self._generator, name)


def _wrap_backward(ext: Any) -> None:
    original = torch.autograd._engine_run_backward

    @functools.wraps(original)
    def run(roots: Any, *args: Any, **kwargs: Any) -> Any:
        if not ext.active():
            return original(roots, *args, **kwargs)
        verdict = EAGER
        roots = tuple(roots)
        if kwargs.get("accumulate_grad") and len(args) == 4 and _plain(roots, args):
            verdict = ext.backward(list(roots), list(args[0]), bool(args[1]))
            if verdict == DEFERRED:
                return ()
        ext.sync()
        result = _quiet(ext, original, (roots, *args), kwargs)
        if verdict == RECORD:
            ext.end_backward()
        return result

    torch.autograd._engine_run_backward = run  # type: ignore[assignment]


def _plain(roots: tuple[Any, ...], args: Any) -> bool:
    """Tensors with given gradients, no graph of the gradients, all leaves."""
    seeds, _, create_graph, inputs = args
    tensors = all(isinstance(t, torch.Tensor) for t in (*roots, *seeds))
    return tensors and not create_graph and not inputs


def _wrap_apply(ext: Any) -> None:
    """Functions of the user's own run at once, and so does what is differentiated through them."""
    original = torch.autograd.Function.apply.__func__

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not ext.active():
            return original(cls, *args, **kwargs)
        ext.sync()
        ext.taint()
        return _quiet(ext, original, (cls, *args), kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign,assignment]


def _wrap_dual(ext: Any) -> None:
    """Forward-mode differentiation runs as it is."""
    module = torch.autograd.forward_ad
    enter, leave = module.enter_dual_level, module.exit_dual_level
    depth: list[bool] = []

    def entered() -> int:
        ext.sync()
        ext.taint()
        depth.append(ext.suspend())
        return enter()

    def left(*args: Any, **kwargs: Any) -> None:
        leave(*args, **kwargs)
        ext.resume(depth.pop() if depth else False)

    module.enter_dual_level, module.exit_dual_level = entered, left


@cache
def keep_traces_apart() -> None:
    """While torch.fx traces on one thread, modules called on others are not part of it."""
    from torch.fx._symbolic_trace import _Patcher

    original = _Patcher.patch_method

    def patch_method(self: Any, owner: type, name: str, new: Any, deduplicate: bool = True) -> None:
        before, thread = getattr(owner, name), threading.get_ident()

        @functools.wraps(new)
        def method(*args: Any, **kwargs: Any) -> Any:
            return (new if threading.get_ident() == thread else before)(*args, **kwargs)

        original(self, owner, name, method, deduplicate)

    _Patcher.patch_method = patch_method  # type: ignore[method-assign,assignment]


@cache
def wrap_dynamo(ext: Any) -> None:
    """Functions under torch.compile get tensors with their values, and the interceptor off."""
    frame = sys.modules["torch._dynamo.eval_frame"]
    original = frame._maybe_set_eval_frame
    depth = threading.local()

    def switch(callback: Any) -> Any:
        entered = getattr(depth, "count", 0)
        if callback is None or callback is False:
            if entered:
                depth.count = entered - 1
                ext.pause(depth.count > 0)
        elif entered or ext.active():
            ext.sync()
            ext.taint()
            depth.count = entered + 1
            ext.pause(True)
        return original(callback)

    frame._maybe_set_eval_frame = switch
