import contextlib
import io
import os
import shutil

import pytest
import torch
from torch import Tensor, nn

import regraft
from regraft.program.folders import cache_dir
from regraft.runtime.coexec.build import extension

REAL = cache_dir()


@pytest.fixture(scope="session", autouse=True)
def one_build(own_cache, tmp_path_factory):
    """The extension is built once a run, whatever the number of workers."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "coexec-build"
    shared.mkdir(exist_ok=True)
    for built in (REAL / "coexec").glob("*.so"):
        with contextlib.suppress(FileExistsError):
            (shared / built.name).symlink_to(built)
    if not (own_cache / "coexec").exists():
        (own_cache / "coexec").symlink_to(shared)
    if extension() is None:
        assert not any(map(shutil.which, ("c++", "g++", "clang++"))), "the extension is not built"
        pytest.skip("no C++ compiler")


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def apart(own_cache, tmp_path_factory):
    """A cache without the pieces of other tests."""
    folder = tmp_path_factory.mktemp("apart")
    (folder / "coexec").symlink_to(own_cache / "coexec")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGRAFT_CACHE", str(folder))
        yield


def state(found) -> list:
    """The tensors of whatever a program returns, with their gradients, as one flat list."""
    if isinstance(found, Tensor):
        return [found.detach(), *state(found.grad)]
    if isinstance(found, nn.Module):
        return state([*found.parameters(), *found.buffers()])
    if isinstance(found, torch.optim.Optimizer):
        return state(list(found.state.values()))
    if isinstance(found, dict):
        return state(list(found.values()))
    if isinstance(found, list | tuple):
        return [item for one in found for item in state(one)]
    return [] if found is None else [found]


def outcome(make, wrap, calls):
    """What calls of the function that ``make`` gives return, raise, print and leave behind."""
    torch.manual_seed(7)
    step, kept = make()
    step, seen, printed = wrap(step), [], io.StringIO()
    with contextlib.redirect_stdout(printed):
        for call in range(calls):
            try:
                seen.append(state(step(call)))
            except Exception as error:
                seen.append(f"{type(error).__name__}: {error}")
    return seen, state(kept), printed.getvalue(), torch.get_rng_state()


def equal(left, right) -> bool:
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return left == right


def check(make, calls=8):
    """Bit-equal to eager: function by function, on one thread or two, and as a block."""
    expected = outcome(make, lambda step: step, calls)
    reports = []
    for overlap in (True, False):
        functions = []

        def wrap(step, overlap=overlap, functions=functions):
            functions.append(
                regraft.coexecute(step, backend="replay", measure=False, overlap=overlap)
            )
            return functions[0]

        found = outcome(make, wrap, calls)
        assert equal(expected, found), (expected, found)
        reports.append(functions[0].report())
    before = extension().least(2)
    together = []

    def aten(step):
        together.append(regraft.coexecute(step, backend="aten", measure=False))
        return together[0]

    found = outcome(make, aten, calls)
    extension().least(before)
    assert equal(expected, found), (expected, found, together[0].report())
    with regraft.coexecution():
        found = outcome(make, lambda step: step, calls)
    assert equal(expected, found), (expected, found)
    return reports[0]


@pytest.fixture(name="check")
def check_fixture():
    return check
