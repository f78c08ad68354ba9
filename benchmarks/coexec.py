"""Imperative programs under co-execution, beside eager and torch.compile of module and whole step.

Each program runs in a process of its own, all contenders in turn: one step each a round, medians.
Warm-up is the time of the first steps beyond that of as many later ones; a contender compiles after
those before it, with what they left in memory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from regraft.benchmarks.harness import Check, Result, environment, interleaved, progress
from regraft.benchmarks.programs import PAPER, PROGRAMS

EAGER, MODULE, STEP, REGRAFT = "eager", "compile module", "compile step", "regraft"
WARM, ROUNDS = 30, 60
QUICK = ("BERT-CLS", "DCGAN", "Adam + schedule")
SECONDS = 1200


def run(quick: bool) -> Result:
    names = QUICK if quick else tuple(PROGRAMS)
    rows: list[dict[str, Any]] = []
    with progress("coexec", len(names)) as stage:
        for name in names:
            stage(name)
            rows += _fresh(name)
    command = f"regraft bench coexec{' --quick' if quick else ''}"
    return Result(command, environment(), rows, _checks(rows), chart="ratio")


def _fresh(name: str) -> list[dict[str, Any]]:
    """The rows of one program, from a process of its own."""
    command = [sys.executable, "-m", "regraft.benchmarks.coexec", name]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return [_row(name, f"{EAGER}: not within {SECONDS} s")]
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["?"])[-1][:160]
        return [_row(name, f"{EAGER}: {reason}")]
    return json.loads(result.stdout.splitlines()[-1])


def measure(name: str) -> list[dict[str, Any]]:
    """Steps a second of each contender, its ratio to eager and what warming it up took."""
    steps: dict[str, Callable[[], Any]] = {}
    warm, failed = {}, {}
    for contender in (EAGER, MODULE, STEP, REGRAFT):
        torch.manual_seed(1)
        start = time.perf_counter()
        try:
            step = _contender(contender, name)
            for _ in range(WARM):
                step()
        except Exception as error:
            failed[contender] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        steps[contender], warm[contender] = step, time.perf_counter() - start
    times = {key: statistics.median(t) for key, t in interleaved(steps, ROUNDS).items()}
    report = steps[REGRAFT].report() if REGRAFT in steps else None
    rows = [
        _row(name, contender) | {
            "steps/s": 1 / seconds,
            "ratio": times[EAGER] / seconds,
            "warm-up s": max(0.0, warm[contender] - WARM * seconds),
            "mode": report.mode if report and contender == REGRAFT else None,
            "symbolic": report.symbolic if report and contender == REGRAFT else None,
        }
        for contender, seconds in times.items()
    ]  # fmt: skip
    return rows + [_row(name, f"{contender}: {why}") for contender, why in failed.items()]


def _contender(contender: str, name: str) -> Any:
    import regraft

    program = PROGRAMS[name]()
    if contender == MODULE:
        program.forward = torch.compile(program.forward)
    if contender == STEP:
        return torch.compile(program.step)
    return regraft.coexecute(program.step) if contender == REGRAFT else program.step


def _row(program: str, contender: str) -> dict[str, Any]:
    empty = dict.fromkeys(("steps/s", "ratio", "warm-up s", "mode", "symbolic"))
    return {"model": program, "test": contender, **empty}


def _checks(rows: list[dict[str, Any]]) -> list[Check]:
    ratios: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["ratio"] is not None:
            ratios.setdefault(row["model"], {})[row["test"]] = row["ratio"]
    own = {name: found[REGRAFT] for name, found in ratios.items() if REGRAFT in found}
    over = {
        name: ratio / max(ratios[name].get(other, 0.0) for other in (MODULE, STEP))
        for name, ratio in own.items()
        if MODULE in ratios[name] or STEP in ratios[name]
    }

    def mean(values: dict[str, float]) -> float | None:
        found = [value for name, value in values.items() if name in PAPER]
        return statistics.geometric_mean(found) if len(found) == len(PAPER) else None

    return [
        Check.at_least("programs that run", float(len(own)), len({row["model"] for row in rows})),
        Check.at_least("slowest / eager", min(own.values(), default=None), 0.97),
        Check.at_least("geometric mean of the ten / eager", mean(own), 1.3),
        Check.at_least("geometric mean of the ten / better torch.compile", mean(over), 1.15),
    ]


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
