"""Stretches compiled by Inductor: within rounding of float64, numbers that change included."""

import threading
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.program import RegraftError
from regraft.runtime.coexec.build import extension
from regraft.runtime.coexec.hooks import keep_traces_apart


@pytest.fixture(autouse=True)
def short_ones_too():
    before = extension().least(8)
    yield
    extension().least(before)


def training(dtype, wrap, steps=24):
    """An Adam whose corrections and rate change every step; losses, parameters, waits."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4)).to(dtype)
    data = torch.randn(6, 16, 8).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)

    def step(turn):
        loss = F.cross_entropy(model(data[turn % 6]), torch.arange(16) % 4)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return loss

    step = wrap(step)
    losses = [step(turn).item() for turn in range(steps)]
    return step, losses, [p.detach().double() for p in model.parameters()]


def test_a_training_step_is_one_function_and_within_rounding_of_float64():
    _, losses, exact = training(torch.float64, lambda f: f)
    _, _, eager = training(torch.float32, lambda f: f)
    step, found, compiled = training(
        torch.float32, lambda f: regraft.coexecute(f, backend="inductor", measure=False)
    )
    assert torch.allclose(torch.tensor(found), torch.tensor(losses), atol=1e-4)
    for ours, theirs, true in zip(compiled, eager, exact, strict=True):
        assert (ours - true).abs().max() <= 4 * (theirs - true).abs().max() + 1e-6
    made = [s for s in step.report().segments if s[1] > 5]
    assert len(made) == 1 and made[0][0] > 50  # forward, backward, clipping and update


@pytest.mark.usefixtures("one_thread")
def test_compiling_beside_the_program_leaves_its_random_numbers_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def program(wrap):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5))

        @wrap
        def step():
            with torch.no_grad():
                return model(torch.randn(4, 8)).exp().log().sin().cos().sum()

        return step

    step, found = program(regraft.coexecute), []
    deadline = time.monotonic() + 120
    while not step.settled and time.monotonic() < deadline:
        found.append(step().item())
    after = torch.get_rng_state()
    assert any(s[1] for s in step.report().segments), step.report()
    eager = program(lambda f: f)
    expected = [eager().item() for _ in found]
    assert torch.equal(after, torch.get_rng_state())
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-5, equal_nan=True)


def test_numbers_are_kept_to_the_bit_and_picks_may_change():
    rows = torch.arange(24.0).view(6, 4)

    def step(turn):
        x = rows[turn % 6] * torch.iinfo(torch.int64).max + float("nan") * 0
        y = torch.zeros(4, dtype=torch.long) + torch.iinfo(torch.int64).max
        z = (rows[(turn + 1) % 6] * (0.5 if turn < 9 else turn)).sin().cos().exp().sqrt()
        return x.isnan().tolist(), y.tolist(), z.tolist()

    together = regraft.coexecute(step, backend="aten", measure=False)
    for turn in range(24):
        assert together(turn) == step(turn)
    assert max(s[1] for s in together.report().segments) > 5


def test_what_was_kept_once_is_given_from_then_on():
    model, kept = nn.Linear(4, 4), []

    def step(turn):
        x = torch.full((2, 4), float(turn % 3))
        hidden = model(x).relu()
        if turn > 12:
            kept.append(hidden)
        y = (hidden * 2 + 1).tanh().exp().sin().cos().square().sum()
        return y.item()

    with torch.no_grad():
        expected = [step(turn) for turn in range(20)]
        first, kept = kept, []
        together = regraft.coexecute(step, backend="aten", measure=False)
        assert [together(turn) for turn in range(20)] == expected
    assert all(map(torch.equal, first, kept))


def test_a_spent_graph_is_told_as_eager_tells_it():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @regraft.coexecute(backend="aten", measure=False)
    def step():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(8):
        loss = step()
    assert any(s[1] for s in step.report().segments)
    assert loss.requires_grad and not loss.is_leaf
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_backend_that_is_not_known():
    with pytest.raises(RegraftError, match="inductor, aten, replay"):
        regraft.coexecute(lambda: 0, backend="tvm")


def test_modules_of_other_threads_are_no_part_of_a_trace():
    keep_traces_apart()
    inside, outside, found = threading.Event(), threading.Event(), []

    class Waits(nn.Module):
        def forward(self, x):
            inside.set()
            assert outside.wait(20)
            return x + 1

    worker = threading.Thread(target=lambda: found.append(torch.fx.symbolic_trace(Waits())))
    worker.start()
    assert inside.wait(20)
    try:
        assert nn.Linear(2, 2)(torch.ones(1, 2)).shape == (1, 2)
    finally:
        outside.set()
        worker.join()
    assert len(found) == 1
