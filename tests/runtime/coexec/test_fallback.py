"""Modules that cannot be captured come back co-executed."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import regraft
from regraft.benchmarks.small_models import small_model
from regraft.program import RegraftError
from tests.conftest import tiny


class Halting(nn.Module):
    """Computes until it is sure, at most ten turns, and counts them."""

    def __init__(self):
        super().__init__()
        self.cell, self.halt = nn.GRUCell(6, 6), nn.Linear(6, 1)
        self.turns = nn.Buffer(torch.zeros((), dtype=torch.long))
        self.last = None

    def forward(self, x, *, threshold=0.9):
        state, sure = torch.zeros_like(x), 0.0
        for self.last in range(10):
            state = self.cell(x, state)
            sure += torch.sigmoid(self.halt(state)).mean().item()
            self.turns += 1
            if sure > threshold:
                break
        return state


class Suppress(nn.Module):
    """Keeps the best of boxes that overlap, in numpy."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        found = self.head(x)
        scores, left = found[:, 4].detach().numpy(), found[:, 0].detach().numpy()
        kept: list[int] = []
        for i in np.argsort(-scores):
            if all(abs(left[i] - left[j]) > 0.3 for j in kept):
                kept.append(int(i))
        return found[kept].sigmoid()


def inputs(kind):
    return (torch.randn(5, 6 if kind is Halting else 8),)


@pytest.mark.parametrize(
    ("kind", "line"),
    [(Halting, "if sure > threshold"), (Suppress, "scores, left = found")],
)
def test_a_module_runs_as_it_is_and_says_what_stopped_capture(kind, line, notices):
    torch.manual_seed(0)
    module = kind()
    mirror = copy.deepcopy(module)
    fast = regraft.compile(module, example_inputs=inputs(kind))
    (notice,) = notices
    assert "not compiled but co-executed" in notice and "test_fallback.py" in notice
    assert line in notice and "\n" not in notice
    for _ in range(12):
        x = inputs(kind)
        torch.testing.assert_close(fast(*x), mirror(*x))
    torch.testing.assert_close(fast.state_dict(), mirror.state_dict())
    report = fast.report()
    assert report.calls == 12 and report.symbolic > 0.3 and report.fetches


def test_it_is_the_module_that_it_came_from():
    torch.manual_seed(0)
    module = Halting()
    fast = regraft.compile(module, example_inputs=inputs(Halting))
    assert module.turns == 0 and module.training  # the trial ran on a copy
    assert isinstance(fast, Halting) and fast.state_dict().keys() == module.state_dict().keys()
    assert all(a is b for a, b in zip(fast.parameters(), module.parameters(), strict=True))
    assert not fast.eval().training and not module.training and fast.train().cell.training
    fast(*inputs(Halting), threshold=3.0)
    assert module.last == fast.last > 2
    fast(*inputs(Halting)).sum().backward()
    assert module.cell.weight_ih.grad is not None
    apart = copy.deepcopy(fast)
    with torch.no_grad():
        apart.halt.bias.fill_(50.0)
    x = inputs(Halting)
    assert apart(*x).shape == fast(*x).shape and (apart.last, fast.last != 0) == (0, True)
    for method in ("save", "export_onnx"):
        with pytest.raises(RegraftError, match="co-executed and has no graph"):
            getattr(fast, method)("folder")


def test_it_is_refused_where_a_graph_is_needed():
    module, x = Halting(), inputs(Halting)
    with pytest.raises(RegraftError, match=r"KVQuant cannot be applied without one graph.*\.py:"):
        regraft.compile(module, [regraft.KVQuant(bits=4)], example_inputs=x)
    for options in ({"fallback": "error"}, {"target": "reference"}):
        with pytest.raises(RegraftError, match="depends on the values"):
            regraft.compile(module, example_inputs=x, **options)
    with pytest.raises(RegraftError, match="unknown fallback 'eager'"):
        regraft.compile(module, example_inputs=x, fallback="eager")


@pytest.mark.parametrize(
    ("examples", "message"),
    [((torch.ones(5, 7),), "cannot be exported"), ((), "must fit forward"), ("x", "is a str")],
)
def test_wrong_examples_are_errors_as_before(examples, message, notices):
    with pytest.raises(RegraftError, match=message):
        regraft.compile(Halting(), example_inputs=examples)
    assert not notices


@pytest.mark.parametrize("name", ["openai-gpt", "xlm"])
def test_language_models_that_keep_no_cache_generate(name, notices):
    model = tiny(name) if name == "openai-gpt" else small_model(name).eval()
    ids = torch.randint(3, 200, (2, 5), generator=torch.Generator().manual_seed(0))
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    expected = model.generate(ids, **options)
    fast = regraft.compile(model)
    assert "keeps no cache" in notices[0] and type(fast).__name__ == type(model).__name__
    for _ in range(3):
        assert torch.equal(fast.generate(ids, **options), expected)
    with torch.no_grad():
        torch.testing.assert_close(fast(ids)[0], model(ids)[0])
    assert fast.report().calls == 4 and fast.report().symbolic > 0.5
