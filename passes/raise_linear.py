"""Products with transposed weights to linear layers, the form that passes rewrite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.passes.base import Context, Pass, PassResult, is_call
from regraft.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseLinear(Pass):
    """view(addmm(b, view(x), W)) -> linear(x, W', b)        exact

    What transformers' Conv1D computes, as in GPT-2. W' is a view of the weight.
    """

    def apply(self, program: Program, context: Context) -> PassResult:
        matches = 0
        for node in program.graph.find_nodes(op="call_function", target=aten.addmm.default):
            bias, x, weight = node.args
            if bias.op == weight.op == "get_attr" and not node.kwargs and _is_vector(bias):
                _raise(program, node, bias, x, weight)
                matches += 1
        program.graph.eliminate_dead_code()
        return PassResult(matches)


def _is_vector(bias: fx.Node) -> bool:
    return bias.meta["val"].dim() == 1


def _raise(program: Program, node: fx.Node, bias: fx.Node, x: fx.Node, weight: fx.Node) -> None:
    graph, module = program.graph, program.graph_module
    name = f"{str(weight.target).removesuffix('_weight')}_transposed"
    turned = torch.nn.Parameter(getattr(module, str(weight.target)).detach().t(), False)
    setattr(module, name, turned)
    source, results = _unfolded(node, x)
    with graph.inserting_before(node):
        constant = graph.get_attr(name)
        constant.meta = {**weight.meta, "val": turned}
        linear = graph.call_function(aten.linear.default, (source, constant, bias))
    linear.meta = dict(results[0].meta)
    for result in results:
        result.replace_all_uses_with(linear)


def _unfolded(node: fx.Node, x: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The tensor that ``x`` lays out as rows and what gives the result its shape, else as it is."""
    views: Any = list(node.users)
    if is_call(x, aten.view.default) and all(is_call(user, aten.view.default) for user in views):
        source: Any = x.args[0]
        inner = source.meta["val"].shape
        wanted = [str(n) for n in (*inner[:-1], node.meta["val"].shape[-1])]
        same = inner[-1] == x.meta["val"].shape[-1]
        if same and all([str(n) for n in user.meta["val"].shape] == wanted for user in views):
            return source, views
    return x, [node]
