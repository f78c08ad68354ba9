"""Speed of pruned classifiers, compiled and under onnxruntime, and the time it takes to prune."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import regraft
from regraft.benchmarks.classifiers import SARCASM, accuracy, batches, classifier
from regraft.benchmarks.harness import Check, Result, environment, interleaved, progress
from regraft.benchmarks.prune import BUDGETS, ROWS, classify
from regraft.passes import Prune

LENGTH, BATCHES = 128, (1, 32)
BARS = {0.6: 1.45, 0.5: 1.7}
"""At a share of multiplications at LENGTH tokens: the least speed-up."""
SHARE, POINTS, SECONDS = 0.7, 1.0, 90.0
"""A budget of latency to be met; the most accuracy lost for the largest speed-up; time to prune."""


def run(quick: bool = False) -> Result:
    """quick: 256 rows of calibration, 500 tests, two budgets, few rounds."""
    model, tokenizer = classifier(SARCASM)
    train, held_out = SARCASM.split()
    chosen = random.Random(0).sample(train, 256 if quick else ROWS)
    calibration = batches(tokenizer, chosen, SARCASM.length)
    tests = batches(tokenizer, held_out[: 500 if quick else None], SARCASM.length, 64)
    budgets = tuple(BARS) if quick else BUDGETS
    dense = regraft.compile(model)
    right = accuracy(classify(dense), tests).float().mean()
    variants: dict[float, Any] = {1.0: dense}
    lost, seconds = {1.0: 0.0}, []
    with progress("prune-latency", len(budgets) + 2) as stage:
        for budget in budgets:
            stage(f"pruning to {budget}")
            pruning = Prune(macs=budget, method="reconstruct", sequence_length=LENGTH)
            start = time.perf_counter()
            made = regraft.compile(model, [pruning], calibration=calibration)
            seconds.append(time.perf_counter() - start)
            lost[budget] = 100 * float(right - accuracy(classify(made), tests).float().mean())
            variants[budget] = made
        stage(f"pruning to {SHARE} of the time")
        pruning = Prune(latency=SHARE, sequence_length=LENGTH, tune=False)
        by_time = regraft.compile(model, [pruning], calibration=calibration[:8])
        stage("measuring")
        rows, error = _rows(variants, lost, quick)
        reached = _medians({"dense": dense, "cut": by_time}, 1, quick)
    checks = _checks(rows)
    share = reached["cut"] / reached["dense"]
    checks.append(Check.at_most(f"share of time for latency={SHARE}", share, 1.05 * SHARE))
    checks.append(Check.at_least(f"share of time for latency={SHARE}", share, 0.95 * SHARE))
    checks.append(
        Check.at_most("onnxruntime: largest difference over the largest output", error, 1e-4)
    )
    checks.append(Check.at_most("seconds to prune, the slowest", max(seconds), SECONDS))
    flag = " --quick" if quick else ""
    return Result(
        f"regraft bench prune-latency{flag}", environment(), rows, checks,
        curves=("speed-up", "points lost", "runs"),
    )  # fmt: skip


def _rows(
    variants: dict[float, Any], lost: dict[float, float], quick: bool
) -> tuple[list[dict[str, Any]], float]:
    """Speed-ups over the dense model, variants in turn, medians, of both ways to run, and the
    largest error of those exported."""
    rows, errors, stock = [], [], {}
    with tempfile.TemporaryDirectory() as parent:
        for budget, made in variants.items():
            exported = made.export_onnx(folder := Path(parent, str(budget)))
            errors += exported.errors.values()
            stock[budget] = _stock(folder)
        for name, calls in (("compiled", variants), ("onnxruntime", stock)):
            for batch in BATCHES:
                median = _medians(calls, batch, quick)
                for budget, each in median.items():
                    rows.append(
                        {
                            "runs": f"{name}, batch {batch}",
                            "macs": budget,
                            "ms": 1e3 * each,
                            "speed-up": median[1.0] / each,
                            "points lost": lost[budget],
                        }
                    )
    return rows, max(errors)


def _medians(calls: dict[Any, Any], batch: int, quick: bool) -> dict[Any, float]:
    ids = torch.randint(999, 20_000, (batch, LENGTH), generator=torch.Generator().manual_seed(0))
    rounds = 5 if quick else (60 if batch == 1 else 12)
    named = {str(key): (lambda made=made: made(input_ids=ids)) for key, made in calls.items()}
    seconds = interleaved(named, rounds)
    return {key: statistics.median(seconds[str(key)]) for key in calls}


def _stock(folder: Path) -> Callable[..., Any]:
    """A call of the exported model on stock onnxruntime, as many threads as torch's."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    names = [given.name for given in session.get_inputs()]

    def call(input_ids: torch.Tensor) -> Any:
        ids = input_ids.numpy()
        fill = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        return session.run(None, {name: fill.get(name, ids) for name in names})

    return call


def _checks(rows: list[dict]) -> list[Check]:
    checks = []
    for runs in dict.fromkeys(row["runs"] for row in rows):
        speed = {row["macs"]: row["speed-up"] for row in rows if row["runs"] == runs}
        for budget, least in BARS.items():
            name = f"speed-up at {budget}, {runs}, length {LENGTH}"
            checks.append(Check.at_least(name, speed[budget], least))
        fine = [r["speed-up"] for r in rows if r["runs"] == runs and r["points lost"] < POINTS]
        name = f"the largest speed-up at < {POINTS:g} point, {runs}"
        checks.append(Check.at_least(name, max(fine), 1.56))
    return checks
