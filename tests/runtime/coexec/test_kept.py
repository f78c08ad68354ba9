"""Pieces that were compiled before, found in the cache."""

import os
import subprocess
import sys

import pytest
import torch

import regraft
from regraft.benchmarks.programs import PROGRAMS
from regraft.program.folders import cache_dir
from regraft.runtime.coexec import compiler
from regraft.runtime.coexec.kept import name

NAME = "Adam + schedule"
pytestmark = pytest.mark.usefixtures("one_thread", "apart")


def losses():
    """Of a program's calls, and how many of its stretches were compiled."""
    compiler._known.clear()
    torch.manual_seed(3)
    step = regraft.coexecute(PROGRAMS[NAME]().step, measure=False)
    found = [str(step()) for _ in range(12)]
    return found, sum(how == "compiled" for *_, how in (s[:4] for s in step.report().segments))


@pytest.fixture(scope="module")
def first(one_thread, apart):
    return losses()


def folders():
    return list((cache_dir() / "coexec-pieces").iterdir())


def fail(*args):
    raise AssertionError("compiled anew")


def test_a_second_process_compiles_nothing(first, monkeypatch):
    monkeypatch.setattr(compiler, "compile_function", fail)
    assert losses() == first
    assert first[1] > 0


def test_a_second_process_needs_no_compiler(first):
    code = (
        "import sys, torch, regraft\n"
        "from regraft.benchmarks.programs import PROGRAMS\n"
        "torch.set_num_threads(1), torch.manual_seed(3)\n"
        f"step = regraft.coexecute(PROGRAMS[{NAME!r}]().step, measure=False)\n"
        "print([str(step()) for _ in range(12)])\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == str(first[0]), run.stderr


@pytest.mark.parametrize("file, text", [("0.so", b"\x7fELF"), ("pieces.json", b"{}")])
def test_damaged_files_are_made_anew(first, notices, file, text):
    for folder in folders():
        (folder / file).write_bytes(text)
    assert losses() == first
    assert any("damaged" in notice for notice in notices)
    assert all((folder / file).read_bytes() != text for folder in folders())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    tmp_path.chmod(0o500)
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path))
    assert losses()[1] > 0


def test_names_tell_settings_apart(monkeypatch):
    before = name("x")
    assert name("x") == before != name("y")
    monkeypatch.setenv("TORCHINDUCTOR_CPP_WRAPPER", "1")
    other = name("x")
    torch.set_default_dtype(torch.float64)
    try:
        assert len({before, other, name("x")}) == 3
    finally:
        torch.set_default_dtype(torch.float32)
    torch.set_num_threads(2)
    assert name("x") not in (before, other)
    torch.set_num_threads(1)
