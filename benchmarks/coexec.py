"""Imperative programs under co-execution, beside eager and torch.compile of module and whole step.

Each contender runs in a process of its own beside eager, one step each a round; medians. A ratio is
to the eager of the same process. Warm-up is what the first steps took beyond as many later ones.
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
COLUMNS = ("eager steps/s", "steps/s", "ratio", "warm-up s", "mode", "symbolic")
QUICK = ("BERT-CLS", "DCGAN", "Adam + schedule")
SECONDS = 600


def run(quick: bool) -> Result:
    names = QUICK if quick else tuple(PROGRAMS)
    rows: list[dict[str, Any]] = []
    rivals = (REGRAFT, MODULE) if quick else (REGRAFT, MODULE, STEP)
    with progress("coexec", len(names) * len(rivals)) as stage:
        for name in names:
            for rival in rivals:
                stage(f"{name}, {rival}")
                rows.append(_fresh(name, rival))
    command = f"regraft bench coexec{' --quick' if quick else ''}"
    return Result(command, environment(), rows, _checks(rows), chart="ratio")


def _fresh(name: str, rival: str) -> dict[str, Any]:
    """The row of one program and contender, from a process of its own."""
    command = [sys.executable, "-m", "regraft.benchmarks.coexec", name, rival]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return _row(name, f"{rival}: not within {SECONDS} s")
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["?"])[-1][:160]
        return _row(name, f"{rival}: {reason}")
    return json.loads(result.stdout.splitlines()[-1])


def measure(name: str, rival: str) -> dict[str, Any]:
    """Steps a second, the ratio to eager and what warming up took, of a process that did nothing
    before."""
    warm: dict[str, float] = {}
    steps: dict[str, Callable[[], Any]] = {}
    for contender in (EAGER, rival):
        torch.manual_seed(1)
        start = time.perf_counter()
        steps[contender] = step = _contender(contender, name)
        for _ in range(WARM):
            step()
        warm[contender] = time.perf_counter() - start
    times = {key: statistics.median(t) for key, t in interleaved(steps, ROUNDS).items()}
    row = _row(name, rival) | {
        "eager steps/s": 1 / times[EAGER],
        "steps/s": 1 / times[rival],
        "ratio": times[EAGER] / times[rival],
        "warm-up s": max(0.0, warm[rival] - WARM * times[rival]),
    }
    if rival == REGRAFT:
        report = steps[rival].report()  # type: ignore[attr-defined]
        row |= {"mode": report.mode, "symbolic": report.symbolic}
    return row


def _contender(contender: str, name: str) -> Any:
    import regraft

    program = PROGRAMS[name]()
    if contender == MODULE:
        program.forward = torch.compile(program.forward)
    if contender == STEP:
        return torch.compile(program.step)
    return regraft.coexecute(program.step) if contender == REGRAFT else program.step


def _row(program: str, contender: str) -> dict[str, Any]:
    empty = dict.fromkeys(COLUMNS)
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
    print(json.dumps(measure(*sys.argv[1:3])))
