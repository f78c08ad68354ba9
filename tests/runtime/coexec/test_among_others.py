"""Co-execution beside what else Python and torch do: processes, devices, compilers, operators."""

import os
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.program import RegraftError


def test_nested_use_and_methods():
    class Model:
        scale = 2

        @regraft.coexecute(backend="replay", measure=False)
        def double(self, x):
            return x * self.scale

    model = Model()
    outer = regraft.coexecute(
        lambda x: model.double(model.double(x)) + 1, backend="replay", measure=False
    )
    with regraft.coexecution():
        for _ in range(3):
            assert outer(torch.ones(2)).tolist() == [5, 5]
    assert regraft.coexecute(outer) is outer


@regraft.coexecute(backend="replay", measure=False)
def doubled(x):
    return x * 2


def test_pickle_is_by_name_and_asynchronous_functions_are_refused():
    assert pickle.loads(pickle.dumps(doubled)) is doubled

    async def later():
        pass

    with pytest.raises(regraft.RegraftError, match="asynchronous"):
        regraft.coexecute(later)
    with pytest.raises(regraft.RegraftError, match="function"):
        regraft.coexecute(3)


def test_generator_functions():
    @regraft.coexecute(backend="replay", measure=False)
    def running(xs):
        total = torch.zeros(2)
        for x in xs:
            got = yield (total := total + x)
            total = total if got is None else total * got
        return total

    def collect():
        generator = running([torch.ones(2)] * 4)
        found = [next(generator), generator.send(3.0), next(generator)]
        generator.close()
        return [t.tolist() for t in found]

    assert [collect() for _ in range(3)] == [[[1, 1], [4, 4], [5, 5]]] * 3


def test_a_forked_child_goes_on():
    def forward(x):
        for _ in range(30):
            x = torch.tanh(x * 1.01 + 0.1)
        return x

    step = regraft.coexecute(forward, backend="replay", measure=False)
    expected = step(torch.ones(4))
    for _ in range(3):
        step(torch.ones(4))
    pid = os.fork()
    if pid == 0:
        fine = all(torch.equal(step(torch.ones(4)), expected) for _ in range(3))
        os._exit(0 if fine else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert torch.equal(step(torch.ones(4)), expected)


def test_other_devices_and_kinds_run_as_they_are():
    @regraft.coexecute(backend="replay", measure=False)
    def step():
        a = torch.ones(3, device="meta") * 2
        b = torch.eye(3).to_sparse() * 2
        c = torch.func.vmap(lambda x: x * 2)(torch.ones(3))
        d = torch.func.grad(lambda x: (x * x).sum())(torch.ones(3))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(torch.ones(2), torch.ones(2))
            e = torch.autograd.forward_ad.unpack_dual(dual * dual).tangent
        return a.shape, b.to_dense().sum().item(), c.tolist(), d.tolist(), e.tolist()

    expected = ((3,), 6.0, [2.0] * 3, [2.0] * 3, [2.0] * 2)
    assert [step() for _ in range(3)] == [expected] * 3
    assert "a device without back end" in step.report().fallbacks


def test_torch_compile_inside():
    layer = nn.Linear(4, 4)
    inner = torch.compile(lambda x: layer(x).relu() + 1, backend="aot_eager")
    step = regraft.coexecute(lambda x: inner(x * 2) * 3, backend="replay", measure=False)
    x = torch.randn(2, 4)
    expected = (layer(x * 2).relu() + 1) * 3
    for _ in range(4):
        assert torch.equal(step(x), expected)
    step(x).sum().backward()
    assert layer.weight.grad is not None


def test_gradients_through_checkpoints_and_saved_tensor_hooks():
    def train(wrap):
        torch.manual_seed(0)
        a, b = nn.Linear(4, 4), nn.Linear(4, 4)

        def step():
            x = torch.utils.checkpoint.checkpoint(a, torch.ones(2, 4), use_reentrant=False)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t):
                x = b(x).tanh()
            x.sum().backward()

        step = wrap(step)
        for _ in range(4):
            step()
        return [p.grad for p in (*a.parameters(), *b.parameters())]

    found = train(lambda f: regraft.coexecute(f, backend="replay", measure=False))
    assert all(map(torch.equal, train(lambda f: f), found))


def test_operators_of_others_run_at_once():
    library = torch.library.Library("regraft_coexec_test", "DEF")
    library.define("first(Tensor x) -> Tensor")
    library.impl("first", lambda x: x[: int(x[0])].clone(), "CPU")

    @regraft.coexecute(backend="replay", measure=False)
    def step(n):
        return torch.ops.regraft_coexec_test.first(torch.full((4,), n)).tolist()

    assert [step(n) for n in (1, 2, 1, 3)] == [[1], [2, 2], [1], [3, 3, 3]]


def test_kernels_in_python_run_at_once():
    """Here one whose result's size depends on data, which the operator's schema does not tell."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("hardshrink", lambda x, lambd=0.5: x[: int(x[0])].clone(), "CPU")
    step = regraft.coexecute(
        lambda n: F.hardshrink(torch.full((4,), float(n))) * 1, backend="replay", measure=False
    )
    try:
        assert [len(step(n)) for n in (2, 2, 1, 3, 3, 1)] == [2, 2, 1, 3, 3, 1]
    finally:
        library._destroy()


def test_code_outside_sees_torch_as_it_was():
    """The wrappers of torch's functions and methods do not show where nothing is co-executed."""
    together = regraft.coexecute(lambda x: x + 1, backend="replay", measure=False)
    together(torch.ones(2))
    with torch.device("meta"):
        assert torch.tensor([1.0]).is_meta and torch.asarray([1.0]).is_meta
    assert torch.tensor.__wrapped__ in torch.utils._device._device_constructors()

    class Reads(torch.nn.Module):
        def forward(self, x):
            return torch.tensor(x.numpy())

    with pytest.raises(RegraftError, match="test_among_others.py"):
        regraft.compile(Reads(), example_inputs=(torch.ones(2),), fallback="error")
