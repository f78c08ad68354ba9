"""The programs of bench coexec run under co-execution as they do without."""

import pytest
import torch

import regraft
from regraft.benchmarks.programs import PROGRAMS
from tests.runtime.coexec.conftest import equal, one_build, state  # noqa: F401


@pytest.mark.parametrize("name", PROGRAMS)
def test_is_bit_equal_to_eager(name):
    outcomes = []
    for together in (False, True):
        program = PROGRAMS[name]()
        torch.manual_seed(1)
        step = regraft.coexecute(program.step, backend="replay", measure=False) if together else program.step
        seen = [step() for _ in range(8)]
        outcomes.append((seen, state(program.kept), torch.get_rng_state()))
    assert equal(*outcomes)
    assert step.report().symbolic > 0.3
