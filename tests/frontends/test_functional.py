import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from regraft.frontends.functional import functionalize


def whole(x, y):
    state = x.clone()
    before = state * 2
    state.copy_(y)
    return before + state, state


def index(x, y):
    state = x.clone()
    row = state[:, 1]
    state[:, 1] = y[:, 0]
    state[:, 2:] = 3.0
    return state, row * 1


def narrow(x, y):
    state = torch.zeros_like(x)
    state[:, 1:3] += y[:, 1:3]
    state.mul_(2)
    return state.sum(-1), state


def nested(x, y):
    state = x.clone()
    state[0][1:] = y[0, 1:].double()
    return state + x, x * 1


@pytest.mark.parametrize("function", [whole, index, narrow, nested])
def test_in_place_operators_become_new_tensors(function):
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    module = make_fx(function)(x, y)
    count = sum("copy_" in n.name or "mul_" in n.name for n in module.graph.nodes)
    functionalize(module.graph)
    module.graph.lint()
    module.recompile()
    assert count
    left = [n for n in module.graph.nodes if getattr(n.target, "_schema", None)]
    assert not any(n.target._schema.is_mutable for n in left)
    given = x.clone()
    for expected, got in zip(function(x, y), module(given, y), strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.equal(given, x)


def test_what_cannot_be_followed_stays():
    def transposed(x):
        state = x.clone()
        state.t().copy_(x)
        return state

    x = torch.randn(3, 3)
    module = make_fx(transposed)(x)
    functionalize(module.graph)
    module.recompile()
    assert any(n.target is torch.ops.aten.copy_.default for n in module.graph.nodes)
    assert torch.equal(module(x), x.t())
