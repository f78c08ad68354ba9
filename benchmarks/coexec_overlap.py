"""Python and operators at once: a program that does both, on two threads beside one.

A step issues stretches of matrix products and works in plain Python after each, nothing of which
needs a value; at its end it reads one. The same segments run one after the other (overlap=False)
and at once (overlap=True), interleaved, medians. The bound is that of the longer side alone.

Two checks are of costs: of an operator that is put off, the program's own loop included, and of a
launch, which is all that Python waits for where a compiled stretch has next to nothing to compute.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from regraft.benchmarks.harness import Check, Result, environment, interleaved, progress, threads

STRETCHES, PRODUCTS, WIDTH = 4, 64, 160
EAGER, SERIAL, OVERLAPPED = "eager", "one thread", "two threads"
REPLAY: dict[str, Any] = {"backend": "replay", "measure": False}
CHAIN, SHORT, CALLS, WARM = 256, 24, 50, 30
SHARES = (0.5, 1.0, 2.0)  # Python's work, of the operators'


class Mixed:
    """turns: of a Python loop after each stretch of operators."""

    def __init__(self, turns: int) -> None:
        self.turns, self.log = turns, 0
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(WIDTH, WIDTH, generator=generator)
        self.weight = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]

    def work(self) -> None:
        total = self.log
        for turn in range(self.turns):
            total = (total * 31 + turn) % 1000003
        self.log = total

    @torch.no_grad()
    def step(self) -> float:
        x = self.x
        for _ in range(STRETCHES):
            for _ in range(PRODUCTS):
                x = x @ self.weight
            self.work()
        return x.abs().mean().item()


def run(quick: bool) -> Result:
    rounds, shares = (8, (1.0,)) if quick else (40, SHARES)
    with threads(1):  # without a progress bar, whose thread would take its part of microseconds
        put_off, launch = _put_off() * 1e6, _launch() * 1e6
    with threads(1), progress("coexec-overlap", len(shares)) as stage:
        graph = _seconds(Mixed(0).step)
        turn = _seconds(Mixed(100_000).work) / 100_000
        rows = []
        for share in shares:
            stage(f"Python {share:g} of the operators")
            rows.append(_row(share, int(share * graph / STRETCHES / turn), rounds))
    even = next(row["serial / overlapped"] for row in rows if row["python share"] == 1)
    checks = [
        Check.at_least("equal work: serial / overlapped", even, 1.5),
        Check.at_most("an operator put off, us", put_off, 1),
        Check.at_most("a compiled stretch launched, us", launch, 10),
        Check.at_most("results that differ", float(sum(row["differs"] for row in rows)), 0),
    ]
    command = f"regraft bench coexec-overlap{' --quick' if quick else ''}"
    return Result(command, environment(), rows, checks, chart="serial / overlapped")


def _row(share: float, turns: int, rounds: int) -> dict[str, Any]:
    import regraft

    program = Mixed(turns)
    together = {
        SERIAL: regraft.coexecute(program.step, **REPLAY, overlap=False),
        OVERLAPPED: regraft.coexecute(program.step, **REPLAY, overlap=True),
    }
    expected = program.step()
    differs = sum(step() != expected for step in together.values() for _ in range(5))
    before = together[OVERLAPPED].report()
    timed = interleaved({EAGER: program.step, **together}, rounds)
    ms = {name: statistics.median(seconds) * 1e3 for name, seconds in timed.items()}
    python = _seconds(program.work) * 1e3 * STRETCHES
    graph = _seconds(Mixed(0).step) * 1e3
    after = together[OVERLAPPED].report()
    calls = after.calls - before.calls
    return {
        "test": f"Python {share:g} of the operators",
        "python share": share,
        "python ms": python,
        "operators ms": graph,
        "eager ms": ms[EAGER],
        "one thread ms": ms[SERIAL],
        "two threads ms": ms[OVERLAPPED],
        "serial / overlapped": ms[SERIAL] / ms[OVERLAPPED],
        "bound": (python + graph) / max(python, graph),
        "python stall ms": (after.stall_s - before.stall_s) / calls * 1e3,
        "graph stall ms": (after.graph_stall_s - before.graph_stall_s) / calls * 1e3,
        "differs": differs,
    }


@torch.no_grad()
def _chain(x: torch.Tensor, y: torch.Tensor, length: int) -> float:
    for _ in range(length):
        x = x + y
    return x.sum().item()


def _put_off() -> float:
    import regraft

    step = regraft.coexecute(_chain, **REPLAY, overlap=False)
    return _per_call(step, CHAIN, waiting=False) / CHAIN


def _launch() -> float:
    import regraft

    step = regraft.coexecute(_chain, measure=False)
    return _per_call(step, SHORT, waiting=True)


def _per_call(step: Any, length: int, waiting: bool) -> float:
    """Seconds that Python waits for values, or works besides."""
    call = partial(step, torch.zeros(4, 4), torch.ones(4, 4), length)
    for _ in range(WARM):
        call()
    found = []
    for _ in range(9):
        before, start = step.report().stall_s, time.perf_counter()
        for _ in range(CALLS):
            call()
        taken = time.perf_counter() - start
        waited = step.report().stall_s - before
        found.append((waited if waiting else taken - waited) / CALLS)
    return statistics.median(found)


def _seconds(function: Callable[[], Any], times: int = 9) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return statistics.median(found)
