"""Python and operators at once: a program that does both, on two threads beside one.

A step issues stretches of matrix products and works in plain Python after each, nothing of which
needs a value; at its end it reads one. The same segments run one after the other (overlap=False)
and at once (overlap=True), interleaved, medians. The bound is that of the longer side alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from regraft.benchmarks.harness import Check, Result, environment, interleaved, progress, threads

STRETCHES, PRODUCTS, WIDTH = 4, 64, 160
EAGER, SERIAL, OVERLAPPED = "eager", "one thread", "two threads"
REPLAY: dict[str, Any] = {"backend": "replay", "measure": False}
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


def _seconds(function: Callable[[], Any], times: int = 9) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return statistics.median(found)
