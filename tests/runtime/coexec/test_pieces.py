"""Stretches cut into pieces that begin before all of their operators have come."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.benchmarks.programs import PROGRAMS
from regraft.runtime.coexec import compiled
from regraft.runtime.coexec.pieces import cut, ends
from regraft.runtime.coexec.stretch import Unfit

pytestmark = pytest.mark.usefixtures("one_thread")


def test_where_parts_end():
    calls = list(range(100))
    assert ends(calls, [60], 100) == [30, 61, 100]
    assert ends(calls, [60, 90], 100) == [30, 91, 100]
    assert ends(calls, [97], 100) == [48, 98, 100]
    assert ends(calls, [6], 100) == [100]  # the first part were too short, the second too
    assert ends(calls, [], 100) == [33, 66, 100]
    assert ends(calls[:50], [], 50) == [50]
    assert ends(calls[40:], [60], 100) == [50, 61, 100]  # those before run first


def filled(node):
    """A tensor like the one that was traced."""
    like = node.meta["val"]
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    return made.uniform_(0.01, 0.1) if like.is_floating_point() else made.zero_()


@pytest.mark.parametrize("name", ["BERT-Q&A", "DropBlock", "MusicTransformer", "DCGAN"])
def test_parts_compute_what_the_whole_does(name, monkeypatch):
    seen = []

    def keep(*args):
        seen.append(args)
        raise Unfit("kept for the test")

    monkeypatch.setattr(compiled, "_pieces", keep)
    program = PROGRAMS[name]()
    step = regraft.coexecute(program.step, measure=False)
    for _ in range(8):
        step()
    assert max(map(compare, *zip(*seen, strict=True))) == 3


def compare(graph, traced, inputs):
    """How many parts there are, which give and write the same as the graph, to the bit."""
    where = ends(traced.entries, traced.passes, traced.length)
    found = cut(graph.graph, where, inputs)
    assert found is not None
    parts, views = found
    given = [filled(node) for node in graph.graph.nodes if node.op == "placeholder"]
    whole, values = [x.clone() for x in given], dict(enumerate(x.clone() for x in given))
    with torch.no_grad():
        torch.manual_seed(3)
        expected = graph(*whole)
        torch.manual_seed(3)
        for part in parts:
            results = part.module(*(values[value] for value in part.inputs))
            values |= dict(zip(part.outputs, results, strict=True))
    for want, (value, _, sizes, strides, offset) in zip(expected, views, strict=True):
        base = values[value]
        assert torch.equal(base.as_strided(sizes, strides, base.storage_offset() + offset), want)
    for number, x in enumerate(whole):
        assert torch.equal(values[number], x)
        assert torch.equal(x, given[number]) or any(number in part.writes for part in parts)
    return len(parts)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
            for _ in range(4)
        )

    def forward(self, ids):
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return x.sum(1)


def run(wrap, way, calls=24):
    """Losses, what was raised, and all that is left behind."""
    torch.manual_seed(4)
    model, data = Net(), torch.randint(20, (4, 12))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(turn):
        optimizer.zero_grad()
        loss = way(turn, model, data[turn % 4])
        loss.backward()
        optimizer.step()
        return loss

    step, seen = wrap(step), []
    for turn in range(calls):
        try:
            seen.append(step(turn).item())
        except (IndexError, RuntimeError) as error:
            seen.append((type(error), str(error)))
    return step, seen, [*model.state_dict().values(), torch.get_rng_state()]


def alike(way):
    """The report of a run that ends as eager does."""
    _, expected, left = run(lambda f: f, way)
    step, found, ours = run(lambda f: regraft.coexecute(f, measure=False), way)
    for a, b in zip(found, expected, strict=True):
        assert a == b if isinstance(b, tuple) else abs(a - b) < 1e-4 * abs(b) + 1e-4
    raised = any(isinstance(b, tuple) for b in expected)
    for a, b in zip(ours, left, strict=True):
        if raised and a.dtype == torch.int64:
            continue  # counters of batches: Python's own, which runs ahead of an error
        assert torch.equal(a, b) if a.dtype == torch.uint8 else torch.allclose(a, b, atol=1e-4)
    return step.report()


def plain(turn, model, ids):
    return model(ids).pow(2).mean()


def test_a_step_begins_before_it_has_come_whole():
    report = alike(plain)
    assert report.ahead > 7 and report.strayed == 0
    assert "begun ahead" in str(report)


def test_what_began_is_taken_back_where_the_program_goes_another_way():
    def way(turn, model, ids):
        found = model(ids)
        return found.pow(2).mean() if turn % 6 else found.abs().sin().mean() * 0.5

    report = alike(way)
    assert report.ahead > 5 and report.strayed > 0


def test_what_began_is_taken_back_where_a_value_is_wanted_earlier():
    def way(turn, model, ids):
        found = model(ids)
        if turn in (9, 15):
            assert found.sum().item() == found.sum().item()
        return found.pow(2).mean()

    assert alike(way).strayed > 0


def test_another_thread_may_want_a_value_meanwhile():
    def way(turn, model, ids):
        found = model(ids)
        if turn in (9, 15):
            seen = []
            thread = threading.Thread(target=lambda: seen.append(found.sum().item()))
            thread.start(), thread.join()
            assert seen[0] == found.sum().item()
        return found.pow(2).mean()

    alike(way)


def test_errors_of_a_piece_are_the_operators_own():
    def wrong(turn, model, ids):
        ids = ids.clone() if turn != 12 else torch.full_like(ids, 99)
        return plain(turn, model, ids)

    alike(wrong)


def test_a_number_that_changes_meanwhile():
    def way(turn, model, ids):
        return F.hardtanh(model(ids) * (1 + turn / 10), -50.0, 50.0).pow(2).mean()

    assert alike(way).ahead > 0
