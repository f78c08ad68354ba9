"""Imperative programs under co-execution, beside eager and torch.compile of module and whole step.

Each contender runs in a process of its own beside eager, one step each a round, both from the same
state and seed; medians. A ratio is to the eager of the same process. Settled is when nothing more
is compiled, from the first step on, with all caches empty; warm-up is that time beyond as many
eager steps; "regraft, again" is a second process with those caches. On CUDA warming up is timed in
processes of its own, since those that wait to measure pause.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from regraft.benchmarks.harness import Check, Result, environment, progress
from regraft.benchmarks.programs import PAPER, PROGRAMS
from regraft.runtime.coexec.build import built

EAGER, MODULE, STEP = "eager", "compile module", "compile step"
REGRAFT, AGAIN = "regraft", "regraft, again"
GRAPHS = {f"{which}, reduce-overhead": which for which in (MODULE, STEP)}
WHOLE, WARM_UP = "whole", "warm-up"
CACHES = ("REGRAFT_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
WARM, ROUNDS, MOST_ROUNDS = 30, 60, 500
MEASURED, SETTLING, PAUSE = 3.0, 240.0, 0.1  # seconds
COLUMNS = ("eager steps/s", "steps/s", "ratio", "warm-up s", "settled s", "graphs", "breaks",
           "recompiles", "mode", "symbolic")  # fmt: skip
QUICK = ("BERT-CLS", "DCGAN", "Adam + schedule")
SECONDS = 900


def run(quick: bool) -> Result:
    names = QUICK if quick else tuple(PROGRAMS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rivals = [REGRAFT, MODULE] if quick else [REGRAFT, AGAIN, MODULE, STEP]
    if device == "cuda" and not quick:
        rivals = [REGRAFT, *GRAPHS.values(), *GRAPHS]
    # on a device processes run side by side, but one at a time measures
    width = max(1, (os.cpu_count() or 1) // 2) if device == "cuda" else 1
    stages = [[(rival, WHOLE, name) for rival in rivals for name in names]]
    if device == "cuda" and not quick:
        stages[:0] = [[(rival, WARM_UP, name) for name in names] for rival in (REGRAFT, AGAIN)]
    total = sum(map(len, stages))
    with tempfile.TemporaryDirectory() as folder, progress("coexec", total) as tell:

        def row(job: tuple[str, str, str]) -> dict[str, Any]:
            rival, which, name = job
            made = _fresh(name, rival, device, Path(folder), which)
            tell(f"{name}, {rival}")
            return made

        rows: list[dict[str, Any]] = []
        with ThreadPoolExecutor(width) as pool:
            for stage in stages:
                rows += pool.map(row, stage)
    rows = _merged(rows)
    rows.sort(key=lambda row: names.index(row["model"]))
    command = f"regraft bench coexec{' --quick' if quick else ''}"
    return Result(command, environment(), rows, _checks(rows, device), chart="ratio")


def _merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a program and contender; what warming up alone took counts."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        known = found.setdefault((row["model"], row["test"]), row)
        known |= {key: x for key, x in row.items() if known[key] is None}
    return list(found.values())


def _fresh(name: str, rival: str, device: str, folder: Path, which: str) -> dict[str, Any]:
    """The row of one program and contender, from a process of its own."""
    command = [sys.executable, "-m", "regraft.benchmarks.coexec"]
    command += [name, rival, device, str(folder), which]
    place = f"{name} {REGRAFT if rival == AGAIN else rival}"
    cache = folder / re.sub(r"\W+", "-", place)  # compilers want names without blanks
    extension = cache / "coexec" / built().name
    extension.parent.mkdir(parents=True, exist_ok=True)
    extension.unlink(missing_ok=True)
    extension.symlink_to(built())
    own = dict.fromkeys(CACHES, str(cache))
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, env=os.environ | own
        )
    except subprocess.TimeoutExpired:
        return _row(name, f"{rival}: not within {SECONDS} s")
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["?"]
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Failed)\b", line)]
        reason = (errors or lines)[-1].partition(" Stack trace")[0]  # that names files
        return _row(name, f"{rival}: {reason[:160]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure(name: str, rival: str, device: str, folder: str, which: str) -> dict[str, Any]:
    """Steps a second, the ratio to eager and what warming up took, or that only, of a process that
    did nothing before. Both programs take the same steps with the same random numbers."""
    eager, step = _contender(EAGER, name, device), _contender(rival, name, device)
    with open(Path(folder, "lock"), "w") as lock:
        warm = [_seconds(eager, n) for n in range(WARM)]
        start = time.perf_counter()
        count = _settle(step, lock if device == "cuda" and which == WHOLE else None)
        settled = time.perf_counter() - start
        if which == WARM_UP:
            warm_up = max(0.0, settled - count * statistics.median(warm))
            return _row(name, rival) | {"warm-up s": warm_up, "settled s": settled}
        fcntl.flock(lock, fcntl.LOCK_EX)
        for n in range(WARM, count):
            _seconds(eager, n)
        rounds = round(min(MOST_ROUNDS, max(ROUNDS, MEASURED / statistics.median(warm))))
        both: list[list[float]] = [[], []]
        for n in range(count, count + rounds):
            for turn in (n % 2, 1 - n % 2):
                both[turn].append(_seconds((eager, step)[turn], n))
        times = dict(zip((EAGER, rival), map(statistics.median, both), strict=True))
    row = _row(name, rival) | {
        "eager steps/s": 1 / times[EAGER],
        "steps/s": 1 / times[rival],
        "ratio": times[EAGER] / times[rival],
        "warm-up s": max(0.0, settled - count * times[EAGER]),
        "settled s": settled,
    }
    if hasattr(step, "report"):
        report = step.report()
        made = [segment for segment in report.segments if segment[3] == "compiled"]
        return row | {"mode": report.mode, "symbolic": report.symbolic, "graphs": len(made)}
    from torch._dynamo import utils

    counters = utils.counters
    return row | {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "recompiles": sum(map(len, utils.guard_failures.values())),
    }


def _seconds(step: Callable[[], Any], seed: int) -> float:
    torch.manual_seed(seed)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _settle(step: Any, lock: Any) -> int:
    """Steps until nothing more is compiled, and how many. With a lock they leave the device to
    whoever measures there, and pause."""
    deadline, count = time.perf_counter() + SETTLING, 0
    own = hasattr(step, "report")
    while count < WARM or (own and not step.settled and time.perf_counter() < deadline):
        if own and lock:
            time.sleep(PAUSE)
            fcntl.flock(lock, fcntl.LOCK_SH)
        _seconds(step, count)
        if own and lock:
            fcntl.flock(lock, fcntl.LOCK_UN)
        count += 1
    return count


def _contender(contender: str, name: str, device: str) -> Any:
    import regraft

    program = PROGRAMS[name](device)
    which, mode = GRAPHS.get(contender, contender), None
    if contender in GRAPHS:
        mode = "reduce-overhead"
    if which == MODULE:
        program.forward = torch.compile(program.forward, mode=mode)
    if which == STEP:
        return torch.compile(program.step, mode=mode)
    return regraft.coexecute(program.step) if which in (REGRAFT, AGAIN) else program.step


def _row(program: str, contender: str) -> dict[str, Any]:
    empty = dict.fromkeys(COLUMNS)
    return {"model": program, "test": contender, **empty}


def _checks(rows: list[dict[str, Any]], device: str) -> list[Check]:
    ratios: dict[str, dict[str, float]] = {}
    warm: dict[str, dict[str, float]] = {}
    settled: dict[str, dict[str, float]] = {}
    for row in rows:
        for found, key in ((ratios, "ratio"), (warm, "warm-up s"), (settled, "settled s")):
            if row[key] is not None:
                found.setdefault(row["model"], {})[row["test"]] = row[key]
    rivals = (MODULE, STEP, *GRAPHS)
    own = {name: found[REGRAFT] for name, found in ratios.items() if REGRAFT in found}

    def over(of: dict[str, dict[str, float]], which: str, others: Any, pick: Any) -> dict[str, Any]:
        pairs = {
            name: (found[which], [found[other] for other in others if other in found])
            for name, found in of.items()
            if which in found
        }
        return {name: value / pick(rest) for name, (value, rest) in pairs.items() if rest}

    def mean(values: dict[str, float]) -> float | None:
        found = [value for name, value in values.items() if name in PAPER]
        return statistics.geometric_mean(found) if len(found) == len(PAPER) else None

    fast, faster = (1.7, 1.2) if device == "cuda" else (1.3, 1.15)
    better = mean(over(ratios, REGRAFT, rivals, max))
    slowest = max(over(warm, REGRAFT, (MODULE, STEP), max).values(), default=None)
    seconds = over(settled, AGAIN, (REGRAFT,), max).values()
    again = statistics.median(seconds) if seconds else None
    return [
        Check.at_least("programs that run", float(len(own)), len({row["model"] for row in rows})),
        Check.at_least("slowest / eager", min(own.values(), default=None), 0.97),
        Check.at_least("geometric mean of the ten / eager", mean(own), fast),
        Check.at_least("geometric mean of the ten / better torch.compile", better, faster),
        Check.at_most("longest warm-up / torch.compile's longer one", slowest, 1.5),
        Check.at_most("until a second process is settled / a first, median", again, 0.3),
    ]


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:6])))
