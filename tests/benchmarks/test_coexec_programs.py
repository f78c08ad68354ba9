"""The programs of bench coexec run under co-execution as they do without."""

import pytest
import torch

import regraft
from regraft.benchmarks.programs import PROGRAMS
from tests.runtime.coexec.conftest import equal, one_build, state  # noqa: F401


def outcome(program, step, steps):
    torch.manual_seed(1)
    seen = [step() for _ in range(steps)]
    return seen, state(program.kept), torch.get_rng_state()


@pytest.mark.parametrize("backend", ["replay", "aten"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_is_bit_equal_to_eager(name, backend):
    program, together = PROGRAMS[name](), PROGRAMS[name]()
    step = regraft.coexecute(together.step, backend=backend, measure=False)
    expected = outcome(program, program.step, 8)
    found = outcome(together, step, 8)
    if backend == "aten" and name == "ResNet":  # a learning rate that changes is a tensor there
        assert all(
            torch.allclose(a, b, atol=1e-5) for a, b in zip(expected[1], found[1], strict=True)
        )
    else:
        assert equal(expected, found)
    assert step.report().symbolic > 0.3
