"""A path left at every operator, a value fetched at every operator, and random programs."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import regraft

OPERATORS = [
    lambda x, w: x @ w,
    lambda x, w: x + w[0],
    lambda x, w: torch.relu(x),
    lambda x, w: x.t().contiguous(),
    lambda x, w: x.view(-1).view(4, 4),
    lambda x, w: torch.cat([x, w])[:4],
    lambda x, w: (x * 1.5).mul_(0.9),
    lambda x, w: x.softmax(-1),
    lambda x, w: torch.split(x, 2)[1].repeat(2, 1),
    lambda x, w: x - x.mean(0, keepdim=True),
]
DETOURS = [
    lambda x: torch.sigmoid(x),
    lambda x: x.add(x.sum().item()),
    lambda x: x[x > -100].view(4, 4),
    lambda x: torch.from_numpy(x.detach().numpy().copy()) + x,
]
FETCHES = [
    lambda x: x.sum().item(),
    lambda x: x.detach().numpy().sum(),
    lambda x: str(x.detach()),
    lambda x: bool((x > 0).any()),
]


def training(detour_at, detour, fetch_at, fetch):
    """Eight calls of a step of these operators, forward, backward and update."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4, 4))
    optimizer = torch.optim.SGD([w], lr=0.01, momentum=0.9)

    def step(call):
        seen = []
        x = torch.randn(4, 4)
        for index, operator in enumerate(OPERATORS):
            x = operator(x, w)
            if call in (3, 5) and index == detour_at:
                x = detour(x)
            if call in (4, 5) and index == fetch_at:
                seen.append(fetch(x))
        optimizer.zero_grad()
        x.pow(2).sum().backward()
        if call in (3, 6) and detour_at == len(OPERATORS):
            w.grad = detour(w.grad)
        optimizer.step()
        if call in (4, 6) and fetch_at == len(OPERATORS):
            seen.append(fetch(w))
        return seen, x.detach()

    return w, step


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("index", range(len(OPERATORS) + 1))
def test_divergence_and_cut_at_every_operator(index, kind):
    results = []
    for wrap in (lambda f: f, lambda f: regraft.coexecute(f, backend="replay", measure=False)):
        w, step = training(index, DETOURS[kind], len(OPERATORS) - index, FETCHES[kind])
        step = wrap(step)
        results.append(([step(call) for call in range(8)], w.detach().clone(), w.grad))
    assert step.report().backwards > 0
    (seen, weights, grad), (found, own, own_grad) = results
    assert torch.equal(weights, own) and torch.equal(grad, own_grad)
    for (a, x), (b, y) in zip(seen, found, strict=True):
        assert a == b and torch.equal(x, y)


# a random program works on a list of 2x3 tensors, some of them views of others
def _make(name, function):
    function.__name__ = name
    return function


UNARY = ["relu", "neg", "tanh", "clone", "detach"]
INPLACE = ["relu_", "neg_", "tanh_", "zero_"]
STEP = st.one_of(
    st.tuples(st.sampled_from(UNARY), st.integers(0, 7)),
    st.tuples(st.sampled_from(INPLACE), st.integers(0, 7)),
    st.tuples(st.sampled_from(["add", "mul", "add_", "mul_", "copy_", "cat"]),
              st.integers(0, 7), st.integers(0, 7)),
    st.tuples(st.sampled_from(["row", "flip", "alias", "column"]), st.integers(0, 7)),
    st.tuples(st.sampled_from(["write row", "scale"]), st.integers(0, 7),
              st.sampled_from([0.0, 1.0, -2.5, 0.5])),
    st.tuples(st.sampled_from(["item", "numpy", "branch", "drop", "random"]), st.integers(0, 7)),
)  # fmt: skip


def play(program, tensors, call, seen):
    for name, *arguments in program:
        i = arguments[0] % len(tensors)
        x = tensors[i]
        if name in UNARY:
            tensors.append(getattr(x, name)())
        elif name in INPLACE:
            getattr(x, name)()
        elif name == "cat":
            tensors.append(torch.cat([x, tensors[arguments[1] % len(tensors)]])[1:3])
        elif len(arguments) == 2 and name[0] in "amc" and name != "scale":
            y = tensors[arguments[1] % len(tensors)]
            result = getattr(x, name)(y)
            if not name.endswith("_"):
                tensors.append(result)
        elif name == "row":
            tensors.append(x[0].expand(2, 3))
        elif name == "flip":
            tensors.append(x.flip(0) if call % 2 else x.flip(1))
        elif name == "alias":
            tensors.append(x.view(3, 2).t().t().reshape(2, 3))
        elif name == "column":
            x[:, 1] = float(call)
        elif name == "write row":
            x[0] = arguments[1]
        elif name == "scale":
            x.mul_(arguments[1] * call)
        elif name == "item":
            seen.append(x.sum().item())
        elif name == "numpy":
            seen.append(x.numpy().copy().tolist())
        elif name == "branch" and x.sum() > 0:
            x.sub_(1)
        elif name == "drop" and len(tensors) > 2:
            del tensors[i]
        elif name == "random":
            tensors.append(torch.rand(2, 3) + x)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(STEP, min_size=3, max_size=24))
def test_random_programs_with_views_writes_and_aliases(program):
    outcomes = []
    for together in (False, True):
        torch.manual_seed(1)
        seen, kept = [], torch.arange(6.0).view(2, 3)

        def step(call, seen=seen, kept=kept):
            tensors = [kept, kept[:1].expand(2, 3).clone(), kept.view(-1).view(2, 3)]
            try:
                play(program, tensors, call, seen)
            except RuntimeError as error:  # a write to memory that two elements share
                seen.append(str(error)[:40])
            return tensors

        if together:
            step = regraft.coexecute(
                step, backend="replay", measure=False, overlap=len(program) % 2 == 0
            )
        outcomes.append(([[t.tolist() for t in step(call)] for call in range(4)], copy.copy(seen)))
    assert repr(outcomes[0]) == repr(outcomes[1])
