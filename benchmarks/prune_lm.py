"""Perplexity of pruned SmolLM2 against what is left of its multiplications, beside simpler ways."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import regraft
from regraft.assets import python_docs, smollm2
from regraft.benchmarks.harness import Check, Result, environment, progress
from regraft.benchmarks.prune import STAGES
from regraft.passes import Prune
from regraft.passes.fuse_linear import split_fused
from regraft.passes.pruning.blocks import find
from regraft.passes.pruning.fisher import gradients
from regraft.passes.pruning.samples import samples

BUDGETS = (0.9, 0.8)
COMPARED = ("+ tune", "reconstruct", "magnitude", "fluctuation")
PIECE, CALIBRATION, TESTS = 512, 32, 16
"""Tokens of a piece; pieces of Python's library reference to calibrate on, of its tutorial to test
on."""
AT, MOST = 0.8, 1.35
"""The bar: perplexity over the dense model's at this share of multiplications."""


def run(quick: bool = False) -> Result:
    """quick: 8 pieces to calibrate on and 4 to test on, one budget, two stages."""
    model, calibration, tests = _given(*((8, 4) if quick else (CALIBRATION, TESTS)))
    budgets = (AT,) if quick else BUDGETS
    stages = ("reconstruct", "magnitude") if quick else COMPARED
    compiled = regraft.compile(model, target="reference")
    dense = perplexity(compiled, tests)
    program = compiled.program
    split_fused(program)
    blocks, _ = find(program)
    found = samples(program, calibration, len(calibration), 0)
    with progress("prune-lm", 1 + len(budgets) * len(stages)) as stage:
        stage("gradients")
        gathered = gradients(program, blocks, found, False, lambda _: None)
        rows = []
        for name in stages:
            for budget in budgets:
                stage(f"{name} {budget}")
                pruning = Prune(macs=budget, **STAGES[name])
                shared = gathered if pruning.score == "fisher" else None
                start = time.perf_counter()
                masks, _ = pruning.choose(program, blocks, found, lambda _: None, shared)
                seconds = time.perf_counter() - start
                with tempfile.TemporaryDirectory() as folder:
                    masks.save(file := Path(folder, "masks.safetensors"))
                    made = regraft.compile(model, [Prune(masks=str(file))], target="reference")
                ratio = perplexity(made, tests) / dense
                rows.append(
                    {
                        "model": "SmolLM2", "stage": name, "macs": budget, "kept": masks.share,
                        "dense": dense, "perplexity / dense": ratio, "seconds": seconds,
                    }
                )  # fmt: skip
    ratios = {(row["stage"], row["macs"]): row["perplexity / dense"] for row in rows}
    check = Check.at_most(
        f"perplexity / dense at {AT}, reconstruct", ratios["reconstruct", AT], MOST
    )
    flag = " --quick" if quick else ""
    return Result(
        f"regraft bench prune-lm{flag}", environment(), rows, [check],
        curves=("macs", "perplexity / dense", "stage"), scale="log",
    )  # fmt: skip


def _given(calibration: int, tests: int) -> tuple[Any, list[Tensor], list[Tensor]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def pieces(part: str, count: int) -> list[Tensor]:
        files = sorted((python_docs() / part).glob("*.rst.txt"))
        ids = tokenizer("\n".join(f.read_text() for f in files[:20]), return_tensors="pt")
        return list(ids["input_ids"].split(PIECE, 1)[:count])

    return model, pieces("library", calibration), pieces("tutorial", tests)


def perplexity(compiled: Any, tests: Sequence[Tensor]) -> float:
    """exp of the mean loss of each token but a piece's first."""
    total, tokens = 0.0, 0
    for ids in tests:
        logits = compiled(ids).logits[0, :-1]
        total += F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return math.exp(total / tokens)
