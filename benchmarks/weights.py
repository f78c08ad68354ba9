"""Quality of quantised weights on real text: perplexity and KL divergence against float ones."""

from __future__ import annotations

from typing import Any

import torch

import regraft
from regraft.benchmarks.harness import Check, Result, environment, progress, threads
from regraft.benchmarks.perplexity import measure, scores, text_windows

WINDOW, WINDOWS, PIECES, CHUNK, THREADS = 2048, 2, 16, 512, 2
HELD_OUT = 10
"""Documents that calibration leaves out; the windows are of the first of them."""
MODELS: dict[str, dict[str, Any]] = {
    "8 bits, whole rows": {"bits": 8, "group": None},
    "4 bits, rtn": {"bits": 4, "group": 64},
    "4 bits, awq": {"bits": 4, "group": 64, "method": "awq"},
}


def run(quick: bool) -> Result:
    with threads(THREADS):
        return _run(quick)


def _run(quick: bool) -> Result:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from regraft.assets import python_docs, smollm2

    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    tokenizer, docs = AutoTokenizer.from_pretrained(smollm2()), python_docs()
    size, count, pieces = (512, 1, 2) if quick else (WINDOW, WINDOWS, PIECES)
    windows, names = text_windows(tokenizer, docs, size, count)
    calibration, others = text_windows(tokenizer, docs, 512, pieces, skip=HELD_OUT)
    contenders = {"float32": regraft.compile(model, target="reference")}
    with progress("weights", len(MODELS)) as stage:
        for name, settings in MODELS.items():
            stage(name)
            quantised = [regraft.WeightQuant(**settings)]
            contenders[name] = regraft.compile(
                model, quantised, calibration=calibration, target="reference"
            )
    totals, _ = measure(contenders, windows, CHUNK)
    rows = [
        {"model": name, "weight bits": weight_bits(contenders[name])}
        | scores(total, totals["float32"])
        | {"tokens": total.tokens}
        for name, total in totals.items()
    ]
    ratios = {row["model"]: row["ratio"] for row in rows}
    checks = [
        Check.at_most("8-bit perplexity / float32", ratios["8 bits, whole rows"], 1.01),
        Check.at_most(
            "excess of 4-bit perplexity, awq / rtn",
            (ratios["4 bits, awq"] - 1) / (ratios["4 bits, rtn"] - 1),
            0.75,
        ),
    ]
    return Result(
        f"regraft bench weights{' --quick' if quick else ''}",
        environment(),
        rows,
        checks,
        chart="ratio",
        extra={"texts": names, "calibration": others, "window": size},
    )


def weight_bits(compiled: Any) -> float:
    """Bits that a weight of a linear layer takes, scales included."""
    packed, linear = torch.ops.regraft.packed_linear.default, torch.ops.aten.linear.default
    held = elements = 0
    for node in compiled.program.graph.nodes:
        if node.target in (packed, linear):
            weight = getattr(compiled.program.graph_module, node.args[1].target)
            held += 8 * weight.nbytes
            elements += node.meta["val"].shape[-1] * node.args[0].meta["val"].shape[-1]
    return held / elements
