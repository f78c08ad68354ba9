"""Accuracy of pruned classifiers against what is left of them, stage by stage, beside peers."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import regraft
from regraft.benchmarks import torch_pruning
from regraft.benchmarks.classifiers import SARCASM, Task, accuracy, batches, classifier
from regraft.benchmarks.harness import Check, Result, environment, progress
from regraft.passes import Prune
from regraft.passes.fuse_linear import split_fused
from regraft.passes.pruning.blocks import find
from regraft.passes.pruning.fisher import gradients
from regraft.passes.pruning.masks import Masks
from regraft.passes.pruning.samples import samples

BUDGETS, SEEDS, ROWS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), (0, 1, 2), 2048
STAGES: dict[str, dict[str, Any]] = {
    "search": {"rearrange": False, "tune": False},
    "+ rearrange": {"tune": False},
    "+ tune": {},
    "reconstruct": {"method": "reconstruct"},
    "magnitude": {"score": "magnitude", "tune": False},
    "random": {"score": "random", "tune": False},
    "fluctuation": {"score": "fluctuation", "tune": False},
}
ONCE = ("magnitude", torch_pruning.NAME)
"""Stages that do not depend on the seed, or hardly, and run with the first."""
BARS = {0.6: 1.0, 0.5: 2.0}
"""At a share of multiplications: the most points of accuracy lost."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T_975 = 4.303
"""Student's t of two degrees of freedom: an interval of 95 % for a mean of three."""


def run(quick: bool = False) -> Result:
    """quick: one seed, 500 tests, two budgets, three stages."""
    return accuracies(SARCASM, "prune", quick)


def accuracies(task: Task, suite: str, quick: bool) -> Result:
    """A row a stage and budget: mean points lost over seeds, and half its interval of 95 %.

    Budgets and seeds run in processes of one thread, one a core.
    """
    budgets = (0.6, 0.5) if quick else BUDGETS
    jobs = [(task, seed, b, quick) for seed in (SEEDS[:1] if quick else SEEDS) for b in budgets]
    classifier(task)
    workers = min(len(os.sched_getaffinity(0)), len(jobs))
    spawn = multiprocessing.get_context("spawn")
    found: dict[tuple[str, float], list[dict[str, float]]] = defaultdict(list)
    with (
        progress(f"prune {task.name}", len(jobs)) as stage,
        ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool,
    ):
        for done in as_completed([pool.submit(_job, *job) for job in jobs]):
            for name, budget, row in done.result():
                found[name, budget].append(row)
            stage("")
    order = {name: i for i, name in enumerate([*STAGES, torch_pruning.NAME])}
    rows = [
        _summary(task, name, budget, found[name, budget])
        for name, budget in sorted(found, key=lambda key: (order[key[0]], -key[1]))
    ]
    flag = " --quick" if quick else ""
    made = Result(
        f"regraft bench {suite}{flag}", environment(), rows, _checks(task, rows),
        curves=("macs", "points lost", "stage"), scale="symlog",
    )  # fmt: skip
    made.environment["processes of one thread"] = workers
    return made


def _job(
    task: Task, seed: int, budget: float, quick: bool
) -> list[tuple[str, float, dict[str, float]]]:
    model, tests, right = _dense(task, quick)
    rows = []

    def add(name: str, kept: float, hits: Tensor, seconds: float) -> None:
        lost = 100 * (right.float().mean() - hits.float().mean()).item()
        row = {"kept": kept, "lost": lost, "dense": right.float().mean().item()}
        rows.append((name, budget, {**row, "seconds": seconds}))

    stages = ["+ tune", "reconstruct", "magnitude"] if quick else list(STAGES)
    for name in stages:
        if name in ONCE and seed != SEEDS[0]:
            continue
        start = time.perf_counter()
        masks = _masks(task, seed, Prune(macs=budget, seed=seed, **STAGES[name]))
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            masks.save(file := Path(folder, "masks.safetensors"))
            made = regraft.compile(model, [Prune(masks=str(file))], target="reference")
        add(name, masks.share, accuracy(classify(made), tests), seconds)
    if seed == SEEDS[0] and not quick and torch_pruning.installed():
        start = time.perf_counter()
        peer, share = torch_pruning.pruned(model, _calibration(task, seed), budget)
        seconds = time.perf_counter() - start
        add(torch_pruning.NAME, share, accuracy(classify(peer), tests), seconds)
    return rows


@cache
def _classifier(task: Task) -> tuple[Any, Any]:
    model, tokenizer = classifier(task)
    return model.to(DEVICE), tokenizer


def _moved(found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: x.to(DEVICE) for name, x in batch.items()} for batch in found]


@cache
def _dense(task: Task, quick: bool) -> tuple[Any, list[dict[str, Tensor]], Tensor]:
    """The classifier, its tests, and which it gets right."""
    model, tokenizer = _classifier(task)
    _, held_out = task.split()
    tests = _moved(batches(tokenizer, held_out[: 500 if quick else None], task.length, 64))
    return model, tests, accuracy(classify(regraft.compile(model, target="reference")), tests)


@lru_cache(1)
def _calibration(task: Task, seed: int) -> list[dict[str, Tensor]]:
    _, tokenizer = _classifier(task)
    chosen = random.Random(seed).sample(task.split()[0], ROWS)
    return _moved(batches(tokenizer, chosen, task.length))


@lru_cache(1)
def _scored(task: Task, seed: int) -> tuple[Any, ...]:
    """What all budgets share: the program, its blocks, samples and their gradients."""
    model, _ = _classifier(task)
    program = regraft.compile(model, target="reference").program
    split_fused(program)
    blocks, _ = find(program)
    found = samples(program, _calibration(task, seed), ROWS, seed)
    return program, blocks, found, gradients(program, blocks, found, False, lambda _: None)


def _masks(task: Task, seed: int, pruning: Prune) -> Masks:
    program, blocks, found, gathered = _scored(task, seed)
    given = gathered if pruning.score == "fisher" else None
    return pruning.choose(program, blocks, found, lambda _: None, given)[0]


def classify(model: Any) -> Any:
    """The model's logits of ids, mask and types."""
    return lambda ids, mask, types: (
        model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
    )


def _summary(
    task: Task, name: str, budget: float, found: Sequence[dict[str, float]]
) -> dict[str, Any]:
    lost = [row["lost"] for row in found]
    spread = T_975 * statistics.stdev(lost) / math.sqrt(len(lost)) if len(lost) == 3 else None
    return {
        "model": f"MiniLM {task.name}",
        "stage": name,
        "macs": budget,
        "kept": max(row["kept"] for row in found),
        "dense": found[0]["dense"],
        "points lost": statistics.mean(lost),
        "+-": spread,
        "seeds": len(lost),
        "seconds": statistics.median(row["seconds"] for row in found),
    }


def _checks(task: Task, rows: Sequence[dict[str, Any]]) -> list[Check]:
    lost = {(row["stage"], row["macs"]): row["points lost"] for row in rows}
    ours = ("+ tune", "reconstruct")
    checks = [
        Check.at_most(
            f"{task.name}: points lost at {budget}, {stage}", lost.get((stage, budget)), most
        )
        for budget, most in BARS.items()
        for stage in ours
    ]
    checks += list(_steps(task, lost))
    shares = [row["kept"] / row["macs"] for row in rows if row["stage"] in ours]
    checks.append(Check.at_most(f"{task.name}: kept / budget", max(shares), 1.0))
    checks.append(Check.at_least(f"{task.name}: kept / budget, the least", min(shares), 0.99))
    return checks


def _steps(task: Task, lost: dict[tuple[str, float], float]) -> Iterator[Check]:
    """What each stage loses more than the one before, the mean over budgets."""
    for before, after in (("search", "+ rearrange"), ("+ rearrange", "+ tune")):
        more = [lost[after, b] - lost[before, b] for _, b in lost if (before, b) in lost]
        if more:
            name = f"{task.name}: points lost by {after.strip('+ ')}, mean over budgets"
            yield Check.at_most(name, statistics.mean(more), 0.0)
