"""Where in the model each traced node comes from: its module's path and its line of source."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import fx
from torch.fx import traceback
from torch.nn.modules import module as hooks

_FRAME = re.compile(r'File "(.+)", line (\d+)')
_HERE = Path(__file__).resolve().parent
_OURS = (str(Path(torch.__file__).parent), str(_HERE), str(_HERE.parent / "runtime" / "coexec"))


@contextmanager
def module_paths(model: torch.nn.Module) -> Iterator[None]:
    """Nodes traced inside get the path of the innermost module that is running."""
    paths = {id(module): name for name, module in model.named_modules()}
    running: list[dict[str, tuple[str, type]]] = []
    tracing = threading.get_ident()  # the hooks see the modules of every thread

    def enter(module, *_):
        if threading.get_ident() != tracing:
            return
        path = paths.get(id(module))
        inner = running[-1] if running else {}
        running.append(inner if path is None else {**inner, path: (path, type(module))})
        traceback.get_current_meta()["nn_module_stack"] = running[-1]

    def leave(*_):
        if threading.get_ident() != tracing:
            return
        running.pop()
        traceback.get_current_meta()["nn_module_stack"] = running[-1] if running else {}

    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        with traceback.preserve_node_meta():
            yield
    finally:
        for handle in handles:
            handle.remove()


def name_sources(graph: fx.Graph) -> None:
    """meta["source"] of each node: "model.layers.0.mlp (modeling_llama.py:150)"."""
    for node in graph.nodes:
        stack = node.meta.pop("nn_module_stack", None)
        trace = node.meta.pop("stack_trace", None) or ""
        frames = [f for f in _FRAME.findall(trace) if not f[0].startswith(_OURS)]
        path = next(reversed(stack)) if stack else ""
        line = f"({Path(frames[-1][0]).name}:{frames[-1][1]})" if frames else ""
        if path or line:
            node.meta["source"] = f"{path} {line}".strip()
