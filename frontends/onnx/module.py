"""An ONNX model as a torch module."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import nn

from regraft.frontends.onnx.plan import Plan
from regraft.frontends.onnx.read import read
from regraft.frontends.onnx.values import Host, as_tensor, small
from regraft.program import RegraftError


class OnnxModule(nn.Module):
    """Runs an ONNX graph with torch, operator by operator.

    source: a path, bytes or a ModelProto; RegraftError where it is damaged or unsupported. Call
    it with the graph's inputs in order or by name: tensors, lists for sequences, None for empty
    optionals, Host for strings. The result is the output, or a tuple of several. Initialisers
    are parameters (floating point) and buffers, under their names with underscores for what no
    attribute may hold; inputs that have one are optional.
    """

    def __init__(self, source: str | Path | bytes | onnx.ModelProto | ir.Model) -> None:
        super().__init__()
        model = source if isinstance(source, ir.Model) else read(source)
        self.functions, self.metadata = dict(model.functions), dict(model.metadata_props)
        self.input_values = [
            v for v in model.graph.inputs if v.name not in model.graph.initializers
        ]
        self.inputs = [v.name or "" for v in self.input_values]
        self.outputs = [v.name or "" for v in model.graph.outputs]
        self.output_types = [v.dtype for v in model.graph.outputs]
        self.packed: dict[Any, ir.Value] = {}
        self.plan = Plan(model.graph, self, dict(model.opset_imports))
        self.places = {v.name: i for i, v in enumerate(self.plan.inputs)}

    def hold(self, name: str, value: Any) -> Callable[[], Any]:
        """Keep a constant; the function that comes back gives it."""
        if not torch.is_tensor(value):
            return lambda: value
        name = re.sub(r"\W", "_", name) or "constant"
        while hasattr(self, name):
            name += "_"
        if value.is_floating_point() and value.element_size() > 1:
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            self.register_buffer(name, value)
        make = partial(getattr, self, name)
        held = small(value, make)
        return (lambda: held) if isinstance(held, Host) else make

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(self.inputs):
            raise RegraftError(f"{len(args)} positional inputs, the graph takes {self.inputs}")
        given = dict(zip(self.inputs, args, strict=False))
        if twice := [name for name in kwargs if name in given]:
            raise RegraftError(f"input {twice[0]} was given twice")
        given |= kwargs
        if unknown := [name for name in given if name not in self.places]:
            raise RegraftError(f"unknown input {unknown[0]}: the graph takes {self.inputs}")
        if missing := [name for name in self.inputs if name not in given]:
            raise RegraftError(f"input {missing[0]} is missing: the graph takes {self.inputs}")
        device = next((x.device for x in given.values() if torch.is_tensor(x)), None)
        inputs = {self.plan.inputs[self.places[name]]: value for name, value in given.items()}
        if device is None or device.type == "cpu":
            results = self._run(inputs)
        else:
            with device:
                results = self._run(inputs)
        return results[0] if len(results) == 1 else tuple(results)

    def _run(self, given: dict[ir.Value, Any]) -> list[Any]:
        constants = self.plan.constants
        inputs = [given[v] if v in given else constants[v]() for v in self.plan.inputs]
        return [_tensors(value) for value in self.plan.run(inputs)]


def _tensors(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_tensors(item) for item in value]
    return as_tensor(value)
