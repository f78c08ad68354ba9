"""Remove what capture leaves behind and computes nothing."""

import sys
from dataclasses import dataclass

import torch
from torch import fx

from regraft.passes.base import Context, Pass, PassResult
from regraft.passes.filled import concatenate_filled
from regraft.passes.sizes import Sizes
from regraft.program import Program

aten = torch.ops.aten
CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default)


@dataclass(frozen=True)
class CleanUp(Pass):
    """x.to(x.dtype) -> x;  x * 1.0 -> x;  x[:] -> x;  dropout(x, p, False) -> x    exact

    Gradient switches and assertions on metadata go; repeated pure operators become one;
    sizes of intermediate results become sizes of inputs; buffers filled slice by slice become
    concatenations.
    """

    def apply(self, program: Program, context: Context) -> PassResult:
        matches = Sizes(program).simplify() + concatenate_filled(program.graph)
        seen: dict[tuple, fx.Node] = {}
        mutated = any(_mutates(node) for node in program.graph.nodes)
        for node in list(program.graph.nodes):
            if node.op == "call_function" and (
                node.target is torch._C._set_grad_enabled
                or node.target == aten._assert_tensor_metadata.default
            ):
                program.graph.erase_node(node)
                matches += 1
                continue
            same = _identity(node)
            if same is None and not mutated:
                same = seen.setdefault(_key(node), node) if _pure(node) else None
            if same is not None and same is not node:
                node.replace_all_uses_with(same)
                program.graph.erase_node(node)
                matches += 1
        return PassResult(matches)


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _pure(node: fx.Node) -> bool:
    return node.op == "get_attr" or (node.op == "call_function" and not node.is_impure())


def _key(node: fx.Node) -> tuple:
    return (node.op, str(node.target), repr(node.args), repr(sorted(node.kwargs.items())))


def _identity(node: fx.Node) -> fx.Node | None:
    """The argument that this node returns unchanged, if it does."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    value, result = source.meta.get("val"), node.meta.get("val")
    if not torch.is_tensor(value) or not torch.is_tensor(result):
        return None
    if node.target in CASTS:
        same = value.dtype == result.dtype and value.device == result.device
        return source if same and "copy" not in node.kwargs else None
    if node.target == aten.slice.Tensor and len(node.args) < 5:
        whole = node.args[2:] in ((), (0,), (0, sys.maxsize), (None, sys.maxsize))
        return source if whole else None
    if node.target == aten.mul.Tensor and node.args[1] == 1.0 and value.dtype == result.dtype:
        return source
    if node.target == aten.dropout.default and not node.args[2]:
        return source
    return None
