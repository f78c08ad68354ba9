"""Linear layers of a model of 8B on a GPU, and whole decode steps of it, with random weights.

A layer is timed by CUDA events over a recorded graph of many calls, over copies of its weights that
no cache holds together. A step is timed as callers see it, beside torch.compile.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.benchmarks.cuda import _call, _milliseconds
from regraft.benchmarks.harness import Check, Result, environment, progress
from regraft.benchmarks.linear import _packed
from regraft.kernels import ops  # noqa: F401
from regraft.kernels.linear.formats import dequantize

SHAPES = {
    "q": (4096, 4096), "k": (1024, 4096), "q, k, v": (6144, 4096), "gate": (14336, 4096),
    "gate, up": (28672, 4096), "down": (4096, 14336), "vocabulary": (128256, 4096),
}  # fmt: skip
FORMATS = ("bfloat16", "int4g32z", "int4g32", "int4g32zn", "int8g32")
TORCH, COMPILED, OURS = "torch bfloat16", "torch.compile", "regraft"
MODEL: dict[str, Any] = dict(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip
BYTES, CALLS, REPEATS, SAMPLE, PEAK = 200e6, 40, 9, 256, 3.0
LAYERS, DEPTH, ROUNDS = 8, 128, 60


def run(quick: bool) -> Result:
    from regraft import RegraftError

    if not torch.cuda.is_available():
        raise RegraftError("regraft bench linear-cuda needs a CUDA device")
    names = ("q, k, v",) if quick else tuple(SHAPES)
    rows: list[dict[str, Any]] = []
    checks: list[Check] = []
    with progress("linear-cuda", len(names) + 1) as stage, torch.inference_mode():
        for name in names:
            stage(name)
            more = (4, 8, 16) if name in ("q, k, v", "gate, up") else ()
            for count in (1, *more):
                rows += _layer(name, count, checks)
        stage("decode")
        rows += _decode(2 if quick else LAYERS, checks)
    command = f"regraft bench linear-cuda{' --quick' if quick else ''}"
    return Result(command, environment(), rows, checks, chart="TB/s")


def _layer(name: str, count: int, checks: list[Check]) -> list[dict[str, Any]]:
    channels, columns = SHAPES[name]
    x = torch.randn(count, columns, device="cuda", dtype=torch.bfloat16)
    test = f"{name} {channels}x{columns}, {count} rows"
    found = []
    for format in (TORCH, *FORMATS):
        one = _packed("bfloat16" if format == TORCH else format, channels, columns).cuda()
        weights = [one, *(one.clone() for _ in range(int(BYTES / one.nbytes)))]
        call = F.linear if format == TORCH else partial(_packed_call, format, channels)
        seconds, spread = _seconds(x, weights, call)
        rate = one.nbytes / seconds / 1e12
        base = found[0]["us"] if found else seconds * 1e6
        error = None if format == TORCH else _error(x, one, format, channels)
        found.append({
            "model": format, "test": test, "us": seconds * 1e6, "± iqr": spread,
            "MB": one.nbytes / 1e6, "TB/s": rate, f"of {PEAK} TB/s": rate / PEAK,
            "vs torch": base / (seconds * 1e6), "error": error,
        })  # fmt: skip
        if format != TORCH and count == 1:
            checks.append(Check.at_least(f"{format} {test}: of {PEAK} TB/s", rate / PEAK, 0.85))
    return found


def _packed_call(format: str, channels: int, x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.regraft.packed_linear(x, weight, None, format, channels)


def _seconds(x: Tensor, weights: list[Tensor], call: Callable[..., Tensor]) -> tuple[float, float]:
    """Of a call, the median of replays and their quartiles' distance as a share of it."""
    turns = [weights[i % len(weights)] for i in range(-(-CALLS // len(weights)) * len(weights))]

    def calls() -> None:
        for weight in turns:
            call(x, weight)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    samples = []
    for turn in range(REPEATS + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if turn:
            samples.append(start.elapsed_time(stop) / 1000 / len(turns))
    low, middle, high = statistics.quantiles(samples, n=4)
    return middle, (high - low) / middle


def _error(x: Tensor, weight: Tensor, format: str, channels: int) -> float:
    """Relative error of the product with the first channels, the weights' own rounding apart."""
    few = min(SAMPLE, channels)
    part = weight[: few if format == "bfloat16" else few // 16].contiguous()
    wanted = F.linear(x.double(), dequantize(part, format, few, x.shape[1]).double())
    found = _packed_call(format, few, x, part).double()
    return float((found - wanted).norm() / wanted.norm())


def _decode(layers: int, checks: list[Check]) -> list[dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    import regraft

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model: Any = LlamaForCausalLM(LlamaConfig(**MODEL, num_hidden_layers=layers)).eval()
    finally:
        torch.set_default_dtype(before)
    size = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    ids = torch.randint(3, MODEL["vocab_size"], (1, DEPTH + 1), device="cuda")
    fast = {
        f"{OURS} bfloat16": regraft.compile(model, target="cuda"),
        f"{OURS} 4 bits": regraft.compile(model, [regraft.WeightQuant(bits=4)], target="cuda"),
    }
    torch._dynamo.reset()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=False, dynamic=False)
    static = StaticCache(config=model.config, max_cache_len=DEPTH + ROUNDS + 8)
    steps = {COMPILED: (compiled, static)} | {k: (m, m.new_cache()) for k, m in fast.items()}
    first = {}
    for key, (step, cache) in steps.items():
        _call(model if key == COMPILED else step, ids[:, :DEPTH], cache)
        first[key] = _call(step, ids[:, DEPTH:], cache)

    def timed(key: str) -> Callable[[], None]:
        def function() -> None:
            _call(steps[key][0], ids[:, DEPTH:], steps[key][1])
            torch.cuda.synchronize()

        return function

    times = _milliseconds({key: timed(key) for key in steps}, ROUNDS)
    base, found = times[COMPILED][0], []
    for key, (ms, deviation) in times.items():
        bits = 5 / 16 if "4 bits" in key else 1.0
        error = (first[key] - first[COMPILED]).norm() / first[COMPILED].norm()
        rate = size * bits / ms / 1e9
        found.append({
            "model": key, "test": f"decode, {layers} layers, depth {DEPTH}", "us": 1000 * ms,
            "± iqr": deviation / ms, "MB": size * bits / 1e6, "TB/s": rate,
            f"of {PEAK} TB/s": rate / PEAK, "vs torch": base / ms,
            "error": None if key == COMPILED else float(error),
        })  # fmt: skip
        if key != COMPILED:
            checks.append(Check.at_least(f"{key} decode / {COMPILED}", base / ms, 1.2))
    return found
