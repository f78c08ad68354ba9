"""Quality of cache codes with every position coded: perplexity, KL and agreement against dense.

Teacher-forced over held-out text: each layer attends to keys and values as the codes read back,
the sink excepted. The codes are those of the cache (see ``kernels/kvquant/simulate.py``).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from regraft.benchmarks import kv_modes
from regraft.benchmarks.harness import Check, Result, environment, progress, threads
from regraft.benchmarks.kv_modes import SHARE, Mode
from regraft.benchmarks.perplexity import Total, add, text_windows
from regraft.kernels.kvquant.codebook import fixed
from regraft.passes import DEFAULT, Context, KVQuant
from regraft.passes import run as run_passes
from regraft.passes.budget import Option, cheapest, shares, token_bits
from regraft.passes.calibrate import (
    KINDS,
    PIECES,
    Fit,
    Samples,
    collect,
    fit,
    pieces,
    quantiles,
    spread,
)
from regraft.passes.recorder import Runner
from regraft.program import Program

WINDOW, WINDOWS, LONG, LONG_WINDOWS, THREADS = 2048, 4, 8192, 1, 2
CALIBRATION = 16
BITS, BUDGET = (4, 3, 2), 3.35
SINK = KVQuant().sink
BOUNDS = {4: 1.007, 3: 1.045}


def run(quick: bool) -> Result:
    with threads(THREADS):
        return _run(quick)


def _run(quick: bool) -> Result:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from regraft.assets import python_docs, smollm2
    from regraft.frontends.huggingface import capture

    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    tokenizer, docs = AutoTokenizer.from_pretrained(smollm2()), python_docs()
    tests = {WINDOW: text_windows(tokenizer, docs, WINDOW, 1 if quick else WINDOWS)}
    if not quick:
        tests[LONG] = text_windows(tokenizer, docs, LONG, LONG_WINDOWS)
    count = 2 if quick else CALIBRATION
    texts = text_windows(tokenizer, docs, WINDOW, count, skip=WINDOWS)[0]
    program = capture(model)
    run_passes(program, DEFAULT, Context())
    target = torch.ops.regraft.cached_attention.default
    nodes = program.graph.find_nodes(op="call_function", target=target)
    parts = pieces(texts, None)
    with progress("calibration", min(len(parts), PIECES)) as stage:
        samples = collect(program, nodes, parts, SINK, stage)
    every = modes(samples, (4,) if quick else BITS)
    rows = []
    for size, (windows, _) in tests.items():
        chosen = every if size == WINDOW else [mode for mode in every if _is_long(mode)]
        rows += _rows(size, chosen, measure(program, nodes, chosen, windows))
    return Result(
        f"regraft bench kv-quality{' --quick' if quick else ''}",
        environment(),
        rows,
        checks([row for row in rows if row["window"] == WINDOW]),
        chart="kl",
        extra={
            "texts": {size: names for size, (_, names) in tests.items()},
            "calibration": f"{min(len(parts), PIECES)} pieces of 512 tokens of other documents",
        },
    )


def modes(samples: Sequence[dict[str, Samples]], bits: Sequence[int]) -> list[Mode]:
    """Every way to code the layers that gave the samples."""
    _, heads, _, size = samples[0]["key"].x.shape
    layers = len(samples)
    made, known = [], {}
    for each in bits:
        made += [kv_modes.kivi(each, layers), kv_modes.rotated(each, layers, heads, size)]
        made.append(kv_modes.rotated_vectors(each, layers, size))
        plain = [_ranged(layer, each, "normal_float") for layer in samples]
        made.append(kv_modes.from_fits(f"normal-float {each}-bit", plain, heads, size))
        for share in shares(SHARE):
            known[each, share] = _fitted(samples, each, share, spread(each, weighed=True))
        for share, suffix in ((0.0, ""), (SHARE, " + 1 %")):
            fits = known[each, share]
            if (alone := spread(each, weighed=False)) != spread(each, weighed=True):
                fits = _fitted(samples, each, share, alone)
            made.append(kv_modes.from_fits(f"nuq {each}-bit{suffix}", fits, heads, size))
    if set(bits) == set(BITS):
        made.append(kv_modes.from_fits("nuq mixed", mixed(known, heads, size), heads, size))
    if importlib.util.find_spec("hqq"):
        made += [kv_modes.hqq(each, layers) for each in bits if each in (2, 4)]
    return made


def _fitted(
    samples: Sequence[dict[str, Samples]], bits: int, share: float, qnorm: bool
) -> list[dict[str, Fit]]:
    return [
        {kind: fit(kind, given, bits, share, qnorm) for kind, given in layer.items()}
        for layer in samples
    ]


def mixed(
    known: dict[tuple[int, float], list[dict[str, Fit]]], heads: int, size: int
) -> list[dict[str, Fit]]:
    """The fits of least expected loss within BUDGET effective bits, as KVQuant(bits=BUDGET)."""
    layers = range(len(next(iter(known.values()))))
    options = [
        [
            Option(token_bits(kind, bits, share, heads, size), fits[i][kind].error, fits[i][kind])
            for (bits, share), fits in known.items()
        ]
        for i in layers
        for kind in KINDS
    ]
    chosen = [o.choice for o in cheapest(options, BUDGET * 2 * len(layers) * heads * size)]
    return [dict(zip(KINDS, chosen[2 * i : 2 * i + 2], strict=True)) for i in layers]


def _ranged(layer: dict[str, Samples], bits: int, name: str) -> dict[str, Fit]:
    """A fixed codebook between the calibrated extremes of keys, and those of each value."""
    book = fixed(name, bits)
    scale, zero = quantiles(layer["key"].x, 0.0)
    key = Fit(book, 0.0, math.nan, scale=scale, zero=zero)
    return {"key": key, "value": Fit(book, 0.0, math.nan)}


@torch.inference_mode()
def measure(
    program: Program, nodes: Sequence[fx.Node], chosen: Sequence[Mode], windows: list[Tensor]
) -> dict[str, Total]:
    """Sums of each mode, and of "dense", over windows [1, T]."""
    edits = {"dense": {}} | {mode.name: mode.edits(nodes, SINK) for mode in chosen}
    totals = {name: Total() for name in edits}
    with progress("kv-quality", len(windows) * len(edits)) as stage:
        for ids in windows:
            exact = None
            for name, edit in edits.items():
                stage(f"{name}, {ids.shape[1]} tokens")
                log_p = Runner(program, edit).logits(ids)[0, :-1].log_softmax(-1)
                exact = log_p if exact is None else exact
                add(totals[name], exact, log_p, ids[0, 1:])
    return totals


def checks(rows: Sequence[dict[str, Any]]) -> list[Check]:
    """The bars, and that calibrated codes lie below the others at equal effective bits."""
    by_name = {row["model"]: row for row in rows}
    found = []
    for bits, most in BOUNDS.items():
        row = by_name.get(f"nuq {bits}-bit + 1 %", {})
        found.append(
            Check.at_most(f"nuq {bits}-bit + 1 %: perplexity / dense", row.get("ratio"), most)
        )
    row = by_name.get("nuq mixed", {})
    found.append(Check.at_most("nuq mixed: effective bits", row.get("effective bits"), BUDGET))
    found.append(Check.at_most("nuq mixed: perplexity / dense", row.get("ratio"), 1.03))
    curve = sorted(
        (row["effective bits"], math.log(row["kl"]))
        for row in rows
        if row["model"].startswith("nuq") and row["model"].endswith("+ 1 %")
    )
    for name, row in by_name.items():
        if name.startswith(("uniform", "normal", "QuantizedCache", "rotated")) and len(curve) > 1:
            ours = math.exp(_at(curve, row["effective bits"]))
            found.append(Check.at_most(f"nuq + 1 % / {name}, KL at its bits", ours / row["kl"], 1))
    return found


def _at(curve: Sequence[tuple[float, float]], x: float) -> float:
    """The line through the two points of the ascending curve that are nearest to x."""
    index = min(max(sum(point[0] <= x for point in curve), 1), len(curve) - 1)
    (a, low), (b, high) = curve[index - 1 : index + 1]
    return low + (high - low) * (x - a) / (b - a)


def _is_long(mode: Mode) -> bool:
    return mode.name.endswith("+ 1 %") or "mixed" in mode.name or "2-bit" in mode.name


def _rows(size: int, chosen: Sequence[Mode], totals: dict[str, Total]) -> list[dict[str, Any]]:
    bits = {"dense": 32.0} | {mode.name: mode.bits for mode in chosen}
    dense = totals["dense"]
    return [
        {
            "window": size,
            "model": name,
            "effective bits": bits[name],
            "perplexity": math.exp(total.loss / total.tokens),
            "ratio": math.exp((total.loss - dense.loss) / total.tokens),
            "kl": total.divergence / total.tokens,
            "argmax agreement": total.agreeing / total.tokens,
            "tokens": total.tokens,
        }
        for name, total in totals.items()
    ]
