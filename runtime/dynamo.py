"""``torch.compile(model, backend="regraft")``: our exact passes over dynamo's graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from regraft.passes import CleanUp, Context, RaiseSdpa
from regraft.program import Program, TensorSpec
from regraft.runtime.lower import take_linear


def regraft_backend(module: fx.GraphModule, example_inputs: list[Any]) -> Callable:
    """A function equal to the graph that dynamo captured, for modules that are only to be run.

    Where a gradient is wanted the graph comes back as it was. Weights stay inputs of the graph,
    so training or loading them afterwards takes effect; for that reason nothing is stacked.
    """
    tensors = [value for value in example_inputs if torch.is_tensor(value)]
    if torch.is_grad_enabled() and any(value.requires_grad for value in tensors):
        return module
    placeholders = module.graph.find_nodes(op="placeholder")
    fakes = [node.meta.get("example_value") for node in placeholders]
    mode = next((value.fake_mode for value in fakes if isinstance(value, FakeTensor)), None)
    if mode is None:
        return module
    with mode, torch.no_grad():
        traced = make_fx(module, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    program = Program(traced, tuple(map(_spec, placeholders, fakes)), ())
    for step in (CleanUp(), RaiseSdpa()):
        step.apply(program, Context())
    take_linear(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.recompile()
    return traced


def _spec(node: fx.Node, value: Any) -> TensorSpec:
    if not isinstance(value, Tensor):
        return TensorSpec(node.name, (), torch.int64, "size")
    shape = tuple(n if isinstance(n, int) else str(n) for n in value.shape)
    return TensorSpec(node.name, shape, value.dtype, "input")
