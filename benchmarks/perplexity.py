"""Quality of quantised caches on real text: perplexity and KL divergence against a dense cache."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import regraft
from regraft.benchmarks.harness import Check, Result, environment, progress, threads

WINDOW, WINDOWS, CHUNK, SEED, THREADS = 8192, 4, 64, 0, 2
QUICK_WINDOW = 1024
BOUNDS = {8: 1.002, 4: 1.03}


@dataclass
class Total:
    """Sums over scored tokens."""

    loss: float = 0.0
    divergence: float = 0.0
    agreeing: int = 0
    tokens: int = 0


def run(quick: bool) -> Result:
    with threads(THREADS):
        return _run(quick)


def _run(quick: bool) -> Result:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from regraft.assets import python_docs, smollm2

    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    size, count = (QUICK_WINDOW, 1) if quick else (WINDOW, WINDOWS)
    windows, names = text_windows(
        AutoTokenizer.from_pretrained(smollm2()), python_docs(), size, count
    )
    passes: dict[str, Any] = {"dense": None}
    for bits in (8, 4) if quick else (8, 4, 3, 2):
        passes[f"kvquant {bits}-bit"] = regraft.KVQuant(bits=bits)
    contenders = {
        name: regraft.compile(model, [step] if step else []) for name, step in passes.items()
    }
    totals, shares = measure(contenders, windows, CHUNK)
    rows = _rows(passes, totals, shares, contenders["dense"].program.cache_bytes(2), len(windows))
    by_name = {row["model"]: row for row in rows}
    checks = [
        Check.at_most(
            f"{bits}-bit perplexity / dense", by_name[f"kvquant {bits}-bit"]["ratio"], most
        )
        for bits, most in BOUNDS.items()
    ]
    share = None if quick else by_name["kvquant 4-bit"]["share of float16"]
    checks.append(Check.at_most("4-bit cache at 8K / float16", share, 0.3))
    return Result(
        f"regraft bench perplexity{' --quick' if quick else ''}",
        environment(),
        rows,
        checks,
        chart="ratio",
        extra={"texts": names, "window": size, "chunk": CHUNK},
    )


@torch.inference_mode()
def measure(
    contenders: dict[str, Any], windows: list[Tensor], chunk: int
) -> tuple[dict[str, Total], dict[str, float]]:
    """Sums of each contender against "dense", and its cache's bytes a token at the end.

    Windows [1, T] are fed ``chunk`` tokens at a time, so that all but the latest tokens are
    attended as the cache holds them.
    """
    totals = {name: Total() for name in contenders}
    kept = {}
    steps = sum(-(-ids.shape[1] // chunk) for ids in windows)
    with progress("perplexity", steps) as stage:
        for index, ids in enumerate(windows):
            caches = {name: one.new_cache() for name, one in contenders.items()}
            for start in range(0, ids.shape[1], chunk):
                stage(f"window {index + 1} of {len(windows)}")
                part, target = ids[:, start : start + chunk], ids[0, start + 1 : start + chunk + 1]
                exact = None
                for name, one in contenders.items():
                    logits = one(part, past_key_values=caches[name]).logits[0, : len(target)]
                    log_p = logits.log_softmax(-1)
                    exact = log_p if exact is None else exact
                    add(totals[name], exact, log_p, target)
            kept = {name: cache.nbytes / ids.shape[1] for name, cache in caches.items()}
    return totals, kept


def add(total: Total, exact: Tensor, log_p: Tensor, target: Tensor) -> None:
    """Score log-probabilities [n, vocab] of n target tokens."""
    total.loss -= log_p.gather(1, target[:, None]).sum().item()
    if log_p is not exact:
        total.divergence += (exact.exp() * (exact - log_p)).sum().item()
    total.agreeing += int((exact.argmax(-1) == log_p.argmax(-1)).sum())
    total.tokens += len(target)


def text_windows(
    tokenizer: Any, folder: Any, size: int, count: int, skip: int = 0
) -> tuple[list[Tensor], list[str]]:
    """Token windows [1, size], each at a random place of a random long document, not one of the
    first ``skip``."""
    rng = random.Random(SEED)
    paths = sorted(path for path in folder.rglob("*.rst.txt") if path.stat().st_size > 60_000)
    rng.shuffle(paths)
    windows, names = [], []
    for path in paths[skip:]:
        if len(windows) == count:
            break
        text = path.read_text()
        start = rng.randrange(len(text) // 4)
        ids = tokenizer(text[start : start + 8 * size], return_tensors="pt")["input_ids"]
        if ids.shape[1] >= size:
            windows.append(ids[:, :size])
            names.append(f"{path.relative_to(folder)}@{start}")
    return windows, names


def _rows(
    passes: dict[str, Any],
    totals: dict[str, Total],
    kept: dict[str, float],
    half: int,
    windows: int,
) -> list[dict[str, Any]]:
    """half is what a token takes in float16; the loss is averaged over all windows' tokens."""
    return [
        {"model": name, "bits": passes[name].bits if passes[name] else 32}
        | scores(total, totals["dense"])
        | {
            "kv bytes/token": kept[name],
            "share of float16": kept[name] / half,
            "windows": windows,
            "tokens": total.tokens,
        }
        for name, total in totals.items()
    ]


def scores(total: Total, dense: Total) -> dict[str, float]:
    """The columns that tell of quality, beside the exact model's."""
    loss = torch.tensor([total.loss, dense.loss], dtype=torch.float64) / total.tokens
    perplexity, exact = loss.exp().tolist()
    return {
        "perplexity": perplexity,
        "ratio": perplexity / exact,
        "kl": total.divergence / total.tokens,
        "argmax agreement": total.agreeing / total.tokens,
    }
