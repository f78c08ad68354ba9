"""Accuracy and perplexity of pruned models against what is left of them, beside simpler ways."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

import regraft
from regraft.assets import python_docs, smollm2
from regraft.benchmarks.classifiers import SARCASM, TOPICS, Task, accuracy, batches, classifier
from regraft.benchmarks.harness import Check, Result, environment, interleaved, progress
from regraft.passes import Prune

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
BARS = {0.6: (1.0, 1.45), 0.5: (2.0, 1.7)}
"""At a share of multiplications: the most points of accuracy lost, the least speed-up."""
LENGTH, PIECE = 128, 512


def run(quick: bool = False) -> Result:
    """quick: the first set alone, one seed, 500 tests, two budgets, three stages; no perplexity."""
    rows: list[dict[str, Any]] = []
    checks: list[Check] = []
    for task in (SARCASM,) if quick else (SARCASM, TOPICS):
        found = _accuracies(task, quick)
        rows += found
        checks += _accuracy_checks(task, found)
    model, tokenizer = classifier(SARCASM)
    speed, speed_checks = _latencies(model, tokenizer, quick)
    if not quick:
        perplexity, more = _perplexities()
        rows += perplexity
        checks += more
    flag = " --quick" if quick else ""
    return Result(
        f"regraft bench prune{flag}", environment(), rows, [*checks, *speed_checks], "",
        {"latency": speed},
    )  # fmt: skip


def _accuracies(task: Task, quick: bool) -> list[dict[str, Any]]:
    """A row a stage and budget: mean drop in points over seeds, and half its interval of 95 %."""
    model, tokenizer = classifier(task)
    train, held_out = task.split()
    tests = batches(tokenizer, held_out[: 500 if quick else None], task.length, 64)
    seeds = SEEDS[:1] if quick else SEEDS
    budgets = (0.6, 0.5) if quick else BUDGETS
    stages = ["+ tune", "reconstruct", "magnitude"] if quick else list(STAGES)
    dense = regraft.compile(model, target="reference")
    right = accuracy(_call(dense), tests)
    rows = []
    with progress(f"prune {task.name}", len(stages) * len(budgets) * len(seeds)) as stage:
        for name in stages:
            for budget in budgets:
                drops, seconds, shares = [], [], []
                for seed in seeds:
                    stage(f"{name} {budget}")
                    chosen = random.Random(seed).sample(train, ROWS)
                    start = time.perf_counter()
                    made = regraft.compile(
                        model, [Prune(macs=budget, seed=seed, **STAGES[name])],
                        calibration=batches(tokenizer, chosen, task.length), target="reference",
                    )  # fmt: skip
                    seconds.append(time.perf_counter() - start)
                    kept = accuracy(_call(made), tests)
                    drops.append(100 * (right.float().mean() - kept.float().mean()).item())
                    shares.append(made.program.metadata["masks"].share)
                rows.append(
                    {
                        "model": f"MiniLM {task.name}",
                        "stage": name,
                        "macs": budget,
                        "kept": max(shares),
                        "dense": right.float().mean().item(),
                        "lost": statistics.mean(drops),
                        "+-": 4.3 * statistics.stdev(drops) / 3**0.5 if len(drops) > 2 else None,
                        "seconds": statistics.mean(seconds),
                    }
                )
    return rows


def _accuracy_checks(task: Task, rows: Sequence[dict[str, Any]]) -> list[Check]:
    checks = []
    for budget, (most, _) in BARS.items():
        ours = [
            row["lost"]
            for row in rows
            if row["macs"] == budget and row["stage"] in ("+ tune", "reconstruct")
        ]
        name = f"{task.name}: points lost at {budget} multiplications"
        checks.append(Check.at_most(name, min(ours, default=None), most))
    kept = max(row["kept"] / row["macs"] for row in rows)
    least = min(row["kept"] / row["macs"] for row in rows)
    checks.append(Check.at_most(f"{task.name}: kept / budget", kept, 1.0))
    checks.append(Check.at_least(f"{task.name}: kept / budget, the least", least, 0.99))
    slowest = max(row["seconds"] for row in rows)
    checks.append(Check.at_most(f"{task.name}: seconds to prune, the slowest", slowest, 90))
    return checks


def _call(compiled: Any) -> Any:
    return lambda ids, mask, types: (
        compiled(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
    )


def _latencies(model: Any, tokenizer: Any, quick: bool) -> tuple[list[dict[str, Any]], list[Check]]:
    """Speed-ups of the compiled model over the compiled dense one, in turn, medians."""
    train, _ = SARCASM.split()
    calibration = batches(tokenizer, random.Random(0).sample(train, 256), SARCASM.length)
    variants = {1.0: regraft.compile(model)}
    for budget in BARS:
        pruning = Prune(macs=budget, sequence_length=LENGTH, tune=False)
        variants[budget] = regraft.compile(model, [pruning], calibration=calibration)
    rows, checks = [], []
    for batch in (1, 32):
        ids = torch.randint(
            999, 20_000, (batch, LENGTH), generator=torch.Generator().manual_seed(0)
        )
        calls = {
            str(share): lambda made=made, ids=ids: made(input_ids=ids)
            for share, made in variants.items()
        }
        seconds = interleaved(calls, 5 if quick else (60 if batch == 1 else 12))
        median = {name: statistics.median(found) for name, found in seconds.items()}
        for budget, (_, least) in BARS.items():
            ratio = median["1.0"] / median[str(budget)]
            rows.append({"macs": budget, "batch": batch, "speed-up": ratio})
            name = f"speed-up at {budget}, batch {batch}, length {LENGTH}"
            checks.append(Check.at_least(name, ratio, least))
    return rows, checks


def _perplexities() -> tuple[list[dict[str, Any]], list[Check]]:
    """SmolLM2 on Python's documentation: calibrated on its library, tested on its tutorial."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def pieces(part: str, count: int) -> list[torch.Tensor]:
        files = sorted((python_docs() / part).glob("*.rst.txt"))
        ids = tokenizer("\n".join(f.read_text() for f in files[:20]), return_tensors="pt")
        return list(ids["input_ids"].split(PIECE, 1)[:count])

    calibration, tests = pieces("library", 32), pieces("tutorial", 16)
    dense = _perplexity(regraft.compile(model, target="reference"), tests)
    rows, checks = [], []
    for budget in (0.9, 0.8, 0.7):
        for name in ("+ tune", "reconstruct", "magnitude", "fluctuation"):
            start = time.perf_counter()
            made = regraft.compile(
                model, [Prune(macs=budget, **STAGES[name])], calibration=calibration,
                target="reference",
            )  # fmt: skip
            seconds = time.perf_counter() - start
            ratio = _perplexity(made, tests) / dense
            kept = made.program.metadata["masks"].share
            rows.append(
                {
                    "model": "SmolLM2, perplexity / dense", "stage": name, "macs": budget,
                    "kept": kept, "dense": dense, "lost": ratio, "+-": None, "seconds": seconds,
                }
            )  # fmt: skip
            if budget == 0.8 and name == "reconstruct":
                checks.append(Check.at_most("SmolLM2 at 0.8: perplexity / dense", ratio, 1.35))
    return rows, checks


def _perplexity(compiled: Any, tests: Sequence[torch.Tensor]) -> float:
    total, tokens = 0.0, 0
    for ids in tests:
        logits = compiled(ids).logits[0, :-1]
        total += F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return math.exp(total / tokens)
