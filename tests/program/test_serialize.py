import json

import pytest
import torch
from torch import fx

from regraft.program import RegraftError
from regraft.program.serialize import graph_from_json, graph_to_json, tensors_of

aten = torch.ops.aten


def a_graph():
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("weight")
    y = graph.call_function(aten.linear.default, (x, weight))
    y = graph.call_function(aten.to.dtype, (y, torch.float64))
    y = graph.call_function(aten.clamp.default, (y,), {"min": float("-inf"), "max": 0.5})
    parts = graph.call_function(aten.split_with_sizes.default, (y, [1, 2], -1))
    graph.output((graph.call_function(__import__("operator").getitem, (parts, 1)),))
    root = torch.nn.Module()
    root.weight = torch.nn.Parameter(torch.randn(3, 4), requires_grad=False)
    return fx.GraphModule(root, graph)


def test_a_graph_comes_back_through_text():
    module, x = a_graph(), torch.randn(2, 4)
    text = json.dumps(graph_to_json(module))
    again = graph_from_json(json.loads(text), tensors_of(module))
    assert torch.equal(module(x)[0], again(x)[0])
    assert graph_to_json(again) == json.loads(text)


@pytest.mark.parametrize("target", ["aten.from_file.default", "os.system.default", "evil", 3])
def test_only_known_operators_are_taken(target):
    data = graph_to_json(a_graph())
    data["nodes"][2]["target"] = target
    with pytest.raises(RegraftError):
        graph_from_json(data, tensors_of(a_graph()))


@pytest.mark.parametrize("damage", [{"nodes": 3}, {"nodes": [{}]}, {}, {"nodes": [], "modules": 1}])
def test_damage_is_one_error(damage):
    with pytest.raises(RegraftError, match="damaged"):
        graph_from_json(damage, {})


def test_a_python_function_cannot_be_saved():
    graph = fx.Graph()
    graph.output(graph.call_function(print, (graph.placeholder("x"),)))
    with pytest.raises(RegraftError, match="cannot be saved"):
        graph_to_json(fx.GraphModule({}, graph))
