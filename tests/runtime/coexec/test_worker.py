"""Stretches that a process of its own compiles."""

import os
import subprocess
import sys
from multiprocessing import Pipe

import pytest
import torch

import regraft
from regraft.benchmarks.programs import PROGRAMS
from regraft.program.folders import cache_dir
from regraft.runtime.coexec import compiled, compiler, kept, worker
from regraft.runtime.coexec.compiled import Job, Like
from regraft.runtime.coexec.worker import Worker

NAME = "Adam + schedule"
pytestmark = pytest.mark.usefixtures("one_thread", "apart")


@pytest.fixture(scope="module")
def one():
    found = Worker()
    yield found
    found.close()


@pytest.fixture
def jobs(monkeypatch):
    """What the program asks to compile."""
    found = []

    def record(job: Job):
        found.append(job)
        raise RuntimeError("not compiled")

    compiler._known.clear()
    monkeypatch.setattr(compiler, "compile_function", record)
    monkeypatch.setattr(compiler, "fetch", lambda key: None)
    step = regraft.coexecute(PROGRAMS[NAME]().step, measure=False)
    for _ in range(8):
        step()
    return found


def settled(step):
    """Whether stretches of it were compiled."""
    compiler._known.clear()
    while not step.settled:
        step()
    return {"compiled", "slower than replay"} & {segment[3] for segment in step.report().segments}


PROGRAM = """
import sys, torch, regraft
from regraft.benchmarks.programs import PROGRAMS
from regraft.runtime.coexec import compiler
from regraft.runtime.coexec.worker import Worker

def fail(*_):
    raise AssertionError("compiled")

compiler.compile_function = fail
if sys.argv[2] == "again":
    Worker.compile = fail
torch.set_num_threads(1)
step = regraft.coexecute(PROGRAMS[sys.argv[1]]().step)
while not step.settled:
    step()
print(*{segment[3] for segment in step.report().segments}, sep=";")
"""


@pytest.mark.parametrize("name", [NAME, "FasterRCNN"])  # pieces, and whole functions
def test_the_program_compiles_nothing_itself(name):
    for turn in ("first", "again"):  # when nor does the worker
        command = [sys.executable, "-c", PROGRAM, name, turn]
        run = subprocess.run(command, capture_output=True, text=True)
        assert {"compiled", "slower than replay"} & set(run.stdout.strip().split(";")), run.stderr


def test_what_it_cannot_compile_is_compiled_here(monkeypatch, tmp_path):
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path))
    monkeypatch.setattr(Worker, "compile", lambda self, job: False)
    assert settled(regraft.coexecute(PROGRAMS[NAME]().step))


def test_whole_functions_are_kept(jobs, monkeypatch):
    monkeypatch.setattr(compiled, "_pieces", lambda *_: None)
    job = jobs[0]
    assert kept.store("whole", compiled.compile_function(job, keep=True))
    found = [torch.rand(like.shape).as_strided(like.shape, like.stride) for like in job.inputs]
    numbers = [torch.ones(len(job.traced.varying), dtype=torch.float64)] * bool(job.traced.varying)
    both = []
    for function in (kept.fetch("whole"), compiled.compile_function(job)):
        given = [x.clone() for x in found]
        torch.manual_seed(0)
        with torch.no_grad():
            both.append([*function([*given, *numbers]), *given])
    assert any(not torch.equal(x, y) for x, y in zip(found, given, strict=True))  # it updates
    torch.testing.assert_close(*both, equal_nan=True)


def test_one_that_ended_is_started_again(one, jobs):
    assert jobs and one.compile(jobs[0])
    one._process.kill()
    one._process.wait()
    assert one.compile(jobs[0])


def test_settings_are_the_programs(one, jobs):
    names = set()
    for threads, dtype in ((1, torch.float32), (2, torch.float64)):
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        try:
            assert one.compile(jobs[0])
            names.add(kept.name(jobs[0].computed))
            assert kept.fetch(kept.name(jobs[0].computed)) is not None
        finally:
            torch.set_num_threads(1)
            torch.set_default_dtype(torch.float32)
    assert len(names) == 2


def test_settings_are_those_of_each_job(one, jobs):
    from torch._inductor import config

    before = kept.name(jobs[0].computed)
    with config.patch({"fallback_random": True}):
        assert kept.name(jobs[0].computed) != before and one.compile(jobs[0])
    with kept.own_options(), config.patch({"fallback_random": True}):
        assert kept.name(jobs[0].computed) == before
    assert one.compile(jobs[0])


def test_jobs_that_cannot_be_sent_are_not_its_own(one, jobs):
    job = Job(jobs[0].traced, [*jobs[0].inputs, lambda: None], "inductor")
    assert not one.compile(job)
    assert one.compile(jobs[0])


def test_an_idle_one_ends(monkeypatch):
    monkeypatch.setattr(worker, "IDLE", 0.01)
    ours, theirs = Pipe()
    worker.serve(theirs)
    ours.close()
    worker.serve(theirs)


def test_a_program_that_ends_waits_for_no_compiler(tmp_path):
    (tmp_path / "coexec").symlink_to(cache_dir() / "coexec")
    code = (
        "import regraft\n"
        "from regraft.benchmarks.programs import PROGRAMS\n"
        f"step = regraft.coexecute(PROGRAMS[{NAME!r}]().step)\n"
        "while not step._compiler.waiting: step()\n"
    )
    own = {"REGRAFT_CACHE": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | own)
    assert (run.returncode, run.stderr) == (0, "")
    assert not list(tmp_path.glob("coexec-pieces/*"))


@pytest.mark.parametrize("x", [
    torch.zeros(3, 4).t(), torch.zeros(0, 2), torch.zeros(2, dtype=torch.complex64).conj(),
    torch.zeros(2, dtype=torch.complex64).conj().imag, torch.zeros(5)[1:].expand(2, 4),
    torch.zeros(2, requires_grad=True),
])  # fmt: skip
def test_likes_are_like(x):
    assert Like.of(Like.of(x).fake()) == Like.of(x)
