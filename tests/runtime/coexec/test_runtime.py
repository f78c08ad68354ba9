"""Threads, errors, memory, what is kept and what stays eager."""

import gc
import os
import queue
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.runtime.coexec.build import extension


def forward(x):
    for _ in range(30):
        x = torch.tanh(x * 1.01 + 0.1)
    return x


def test_operators_are_put_off_until_a_value_is_wanted():
    with regraft.coexecution() as report:
        for _ in range(2):
            y = torch.ones(3) + 1
        assert extension().is_pending(y)
        assert y.shape == (3,) and y.dtype == torch.float32 and not y.requires_grad
        assert extension().is_pending(y)
        assert y.tolist() == [2, 2, 2] and not extension().is_pending(y)
        z = y * 3
    assert not extension().is_pending(z)
    assert report().deferred > 0 and any(__file__ in line for line in report().fetches)


def test_long_programs_run_on_another_thread():
    def busy(x):
        y = forward(x)
        time.sleep(0.1)  # Python at work on something else
        return y

    step = regraft.coexecute(busy, backend="replay", measure=False)
    x = torch.randn(8)
    for _ in range(4):
        assert torch.equal(step(x), forward(x))
    assert step.report().executed_aside > 0


def test_a_value_is_read_after_all_writes_to_it():
    """The other thread has made the tensor and some of the writes; the rest are still to come."""

    def step():
        a = torch.ones(1) * 2
        for _ in range(70):
            a.add_(1)
        time.sleep(0.05)
        return a.item()

    step = regraft.coexecute(step, backend="replay", measure=False)
    assert [step() for _ in range(4)] == [72] * 4
    assert step.report().executed_aside > 0


def test_a_placeholder_on_another_thread_gets_its_value():
    found = []

    def step(x):
        y = x * 2 + 1
        thread = threading.Thread(target=lambda: found.append((y + 1).sum().item()))
        thread.start()
        thread.join()
        return y * 3

    step = regraft.coexecute(step, backend="replay", measure=False)
    for _ in range(3):
        step(torch.ones(4))
    assert found == [16.0] * 3


def test_other_threads_see_what_was_written_before_they_were_told():
    weight, found, asked, told = torch.zeros(2), [], threading.Event(), queue.Queue()

    def read():
        for _ in range(3):
            told.get()
            found.append(weight.tolist())
            asked.set()

    def step():
        weight.add_(1)
        told.put(None)
        asked.wait()
        asked.clear()
        weight.mul_(2)

    step, thread = (
        regraft.coexecute(step, backend="replay", measure=False),
        threading.Thread(target=read),
    )
    thread.start()
    for _ in range(3):
        step()
    thread.join()
    assert found == [[1, 1], [3, 3], [7, 7]] and weight.tolist() == [14, 14]


def test_settings_hold_for_the_operators_before_them():
    x = torch.randn(1, 2, 8, 16)

    def step():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            a = F.scaled_dot_product_attention(x, x, x)
        with torch.backends.mkldnn.flags(enabled=False):
            b = F.conv2d(x, torch.ones(3, 2, 3, 3))
        torch.set_default_dtype(torch.float64)
        c = torch.ones(2, dtype=torch.int64) / 3
        torch.set_default_dtype(torch.float32)
        return a, b, c, F.scaled_dot_product_attention(x, x, x), torch.ones(2).long() / 3

    expected, together = step(), regraft.coexecute(step, backend="replay", measure=False)
    for _ in range(3):
        found = together()
        assert all(map(torch.equal, expected, found))
        assert [t.dtype for t in found] == [t.dtype for t in expected]


def test_threads_have_their_own_paths():
    layer = nn.Linear(8, 8)

    @regraft.coexecute(backend="replay", measure=False)
    def step(x):
        loss = layer(forward(x)).sum()
        return loss.item(), torch.autograd.grad(loss, layer.weight)[0]

    inputs = [torch.randn(4, 8) for _ in range(4)]
    expected, found = [step(x) for x in inputs], [[] for _ in inputs]

    def work(place):
        for _ in range(10):
            found[place].append(step(inputs[place]))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (value, grad), results in zip(expected, found, strict=True):
        assert len(results) == 10
        assert all(v == value and torch.equal(g, grad) for v, g in results)


def test_errors_keep_their_type_and_leave_the_function_usable():
    table = nn.Embedding(4, 2)

    @regraft.coexecute(backend="replay", measure=False)
    def step(index, shape):
        x = table(torch.tensor([index])) * 2
        return x.view(shape).sum().item()

    expected = [step(1, (2,)) for _ in range(3)]
    with pytest.raises(RuntimeError, match="shape"):
        step(1, (3,))
    with pytest.raises(IndexError):
        step(9, (2,))
    assert step(1, (2,)) == expected[0]
    with pytest.raises(IndexError):
        step(-7, (2,))
    assert [step(1, (2,)) for _ in range(3)] == expected
    assert step.report().fallbacks["raised: aten::embedding"] == 1


def test_an_exception_of_the_program_leaves_what_ran_before_it():
    weight = torch.zeros(3)

    @regraft.coexecute(backend="replay", measure=False)
    def step(call):
        weight.add_(1)
        if call % 3 == 2:
            raise ValueError(call)
        weight.mul_(2)

    mirror = torch.zeros(3)
    for call in range(9):
        mirror.add_(1)
        if call % 3 == 2:
            with pytest.raises(ValueError):
                step(call)
        else:
            step(call)
            mirror.mul_(2)
        assert torch.equal(weight, mirror)


def test_a_value_that_never_came_says_so():
    table, kept = torch.ones(3), []

    @regraft.coexecute(backend="replay", measure=False)
    def step(index):
        kept.append(table.index_select(0, torch.tensor([index])) + 1)

    step(0), step(1)
    with pytest.raises((IndexError, RuntimeError)):
        step(7)
    with pytest.raises(RuntimeError, match="no value"):
        kept[-1].sum()
    with pytest.raises(RuntimeError, match="no value"):
        kept[-1].tolist()
    assert kept[1].item() == 2


def test_memory_is_freed_when_python_drops_it():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters())
    seen = []

    @regraft.coexecute(backend="replay", measure=False)
    def step(x):
        optimizer.zero_grad()
        h = model[1](model[0](x))
        seen.append(weakref.ref(h))
        loss = model[2](h).sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def tensors():
        gc.collect()
        return sum(isinstance(item, torch.Tensor) for item in gc.get_objects())

    for _ in range(20):
        step(torch.randn(4, 32))
    nodes, count = step.report().nodes, tensors()
    for _ in range(1000):
        step(torch.randn(4, 32))
    assert step.report().nodes == nodes and tensors() <= count
    assert not any(reference() is not None for reference in seen)


def test_paths_without_end_are_bounded():
    @regraft.coexecute(backend="replay", measure=False)
    def step(count):
        x = torch.ones(2)
        for _ in range(count):
            x = x + 1
        return x[0].item()

    assert [step(count) for count in (3, 30, 25000)] == [4, 31, 25001]
    assert step.report().nodes <= 50000


def test_what_does_not_repeat_or_win_stays_eager_and_says_so_once(notices):
    sizes = iter(range(1, 1000))
    step = regraft.coexecute(lambda: torch.ones(next(sizes)).cumsum(0).sum())
    for call in range(1, 40):
        assert step() == call * (call + 1) / 2
    assert step.report().mode == "eager"
    assert [("did not repeat" in notice) for notice in notices] == [True]


def test_calls_are_timed_before_one_kind_is_kept():
    step, expected = regraft.coexecute(forward), forward(torch.ones(3))
    deadline = time.monotonic() + 120
    while not step.report().mode.startswith(("eager", "co-executed")):
        assert time.monotonic() < deadline
        assert torch.allclose(step(torch.ones(3)), expected)
    report = step.report()
    assert report.eager_s and report.coexecuted_s
    assert "ms eager" in str(report)


NO_COMPILER = """
import logging, torch, regraft
logging.basicConfig()
step = regraft.coexecute(lambda x: x * 2)
with regraft.coexecution() as report:
    print([step(torch.ones(2)).tolist() for _ in range(3)], report().mode)
"""


def test_without_a_compiler_programs_run_as_they_are(tmp_path):
    environment = {**os.environ, "PATH": "", "CXX": "", "REGRAFT_CACHE": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", NO_COMPILER], env=environment, text=True,
                            capture_output=True)  # fmt: skip
    assert result.stdout.strip() == "[[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]] eager"
    assert result.stderr.count("co-execution is off") == 1


def test_dropout_draws_in_the_order_of_the_program():
    def step():
        a = F.dropout(torch.ones(6))
        b = torch.rand(2)
        c = torch.rand(2, generator=torch.default_generator)
        return torch.cat([a, b, c]).tolist()

    torch.manual_seed(3)
    expected = [step() for _ in range(4)]
    torch.manual_seed(3)
    together = regraft.coexecute(step, backend="replay", measure=False)
    assert [together() for _ in range(4)] == expected
