import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regraft.runtime.dynamo as dynamo


class Model(nn.Module):
    """Two graphs with a break between them, attention, dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x):
        q, k, v = self.first(x).view(x.shape[0], 3, 2, 4, -1).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).flatten(1)
        torch._dynamo.graph_break()
        y = self.drop(self.norm(self.second(y)))
        return {"y": y * x.shape[0], "rest": [y.reshape(x.shape[0] * 2, 4)]}


@pytest.fixture
def model():
    torch.manual_seed(0)
    torch._dynamo.reset()
    return Model().eval()


@pytest.fixture
def graphs(monkeypatch):
    """(captured, returned) of each call of the backend."""
    seen = []

    def backend(module, inputs):
        seen.append((module, dynamo.regraft_backend(module, inputs)))
        return seen[-1][1]

    return backend, seen


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_torch_compile_knows_the_backend():
    assert "regraft" in torch._dynamo.list_backends()
    compiled = torch.compile(nn.Linear(4, 3), backend="regraft")
    with torch.no_grad():
        assert compiled(torch.ones(2, 4)).shape == (2, 3)


def test_pieces_equal_eager_at_any_batch(model, graphs):
    backend, seen = graphs
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for batch in (2, 3, 5, 1):
            x = torch.randn(batch, 8)
            same(compiled(x), model(x))
    assert len(seen) >= 4 and all(made is not module for module, made in seen)
    targets = {node.target for _, made in seen for node in made.graph.nodes}
    assert torch.ops.regraft.attention.default in targets
    assert torch.ops.aten.dropout.default not in targets


def test_weights_changed_later_take_effect(model, graphs):
    compiled = torch.compile(model, backend=graphs[0])
    x = torch.randn(2, 8)
    with torch.no_grad():
        before = compiled(x)["y"]
        model.first.weight.data.mul_(2)
        model.second.weight = nn.Parameter(torch.randn(8, 8))
        same(compiled(x), model(x))
        assert (compiled(x)["y"] - before).abs().max() > 1e-2


def test_gradients_and_training_are_left_alone(model, graphs):
    backend, seen = graphs
    compiled = torch.compile(model.train(), backend=backend)
    compiled(torch.randn(4, 8))["y"].sum().backward()
    assert model.first.weight.grad.abs().sum() > 0
    assert all(made is module for module, made in seen)


def test_running_statistics_are_updated(model, graphs):
    compiled = torch.compile(model.train(), backend=graphs[0])
    before = model.norm.running_mean.clone()
    with torch.no_grad():
        compiled(torch.randn(4, 8))
    assert not torch.equal(model.norm.running_mean, before)
