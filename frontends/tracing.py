"""A step of a model to an fx graph over symbolic sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from regraft.frontends.provenance import module_paths, name_sources
from regraft.program import RegraftError, TensorSpec


def trace(
    step: torch.nn.Module,
    inputs: Sequence[TensorSpec],
    examples: Sequence[Tensor],
    dynamic: Sequence[tuple[int, ...]],
) -> tuple[fx.GraphModule, dict[str, str], list[Tensor]]:
    """The graph of ``step.forward(*examples)``, {attribute: name of the parameter or buffer} and
    the symbolic tensors that it was traced with.

    dynamic lists, for each input, the dimensions of any size. step.model owns the parameters.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    mode.cache_enabled = False  # keys and entries of symbolic sizes cost more than they save
    fakes = [
        _fake(mode, example, dims, spec.name)
        for spec, example, dims in zip(inputs, examples, dynamic, strict=True)
    ]
    model: Any = step.model
    name = type(model).__name__
    try:
        with mode, module_paths(model):
            module = make_fx(
                step, pre_dispatch=True, record_stack_traces=True, _allow_non_fake_inputs=True
            )(*fakes)
    except Exception as error:
        raise RegraftError(
            f"{name} could not be captured: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    fixed = {
        str(symbol): int(v) for symbol, v in mode.shape_env.replacements.items() if v.is_number
    }
    if fixed:
        raise RegraftError(f"{name} fixes dynamic sizes: {fixed}")
    name_sources(module.graph)
    return module, _name_constants(module, model), fakes


def _fake(mode: FakeTensorMode, tensor: Tensor, dynamic: tuple[int, ...], name: str) -> Tensor:
    sizes = [DimDynamic.DYNAMIC if i in dynamic else DimDynamic.STATIC for i in range(tensor.dim())]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(tensor, symbolic_context=context, source=LocalSource(name))


def _name_constants(module: fx.GraphModule, model: torch.nn.Module) -> dict[str, str]:
    """Give parameters and buffers the names that they have in the model: {attribute: name}."""
    names = {}
    known = {id(t): n for n, t in [*model.named_buffers(), *model.named_parameters()]}
    for node in module.graph.find_nodes(op="get_attr"):
        value = getattr(module, node.target, None)
        if id(value) in known:
            name = known[id(value)].replace(".", "_")
            names[name] = known[id(value)]
            setattr(module, name, value)
            node.target = name
    module.recompile()
    return names
