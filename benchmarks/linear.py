"""One linear layer of one to sixteen rows: packed weights against torch's float32 and int8.

Weights are random and of the sizes of SmolLM2-135M and of a model of 8B; copies of them take turns,
so that each is read from memory. Everything is timed in turn; errors are those against float64.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.benchmarks.harness import (
    Check,
    Result,
    environment,
    interleaved,
    progress,
    threads,
)
from regraft.kernels.linear import packed
from regraft.kernels.linear.formats import Format, dequantize, pack, parse
from regraft.kernels.linear.reference import linear
from regraft.kernels.linear.rounding import round_to_nearest

SHAPES = {
    "135M q, k, v": (960, 576), "135M gate, up": (3072, 576), "135M down": (576, 1536),
    "135M vocabulary": (49152, 576),
    "8B q, k, v": (6144, 4096), "8B gate, up": (28672, 4096), "8B down": (4096, 14336),
}  # fmt: skip
FORMATS = ("bfloat16", "int8", "int8g32", "int4g32z", "int4g32zn", "int6g16n")
FLOAT, ONEDNN = "torch float32", "torch int8"
BYTES, SAMPLE, ROUNDS = 100e6, 256, 9


def run(quick: bool) -> Result:
    names = ("135M gate, up", "8B down") if quick else tuple(SHAPES)
    cases = [(name, rows, count) for name in names for rows, count in _cases(name, quick)]
    rows: list[dict[str, Any]] = []
    with progress("linear", len(cases)) as stage, torch.inference_mode():
        for name, count, cores in cases:
            stage(f"{name}, {count} rows, {cores} threads")
            with threads(cores):
                rows += _measure(name, count, cores, 5 if quick else ROUNDS)
    command = f"regraft bench linear{' --quick' if quick else ''}"
    return Result(command, environment(), rows, _checks(rows), chart="vs float32")


def _cases(name: str, quick: bool) -> list[tuple[int, int]]:
    """(rows, threads)"""
    more = [] if quick or name not in ("135M gate, up", "8B q, k, v") else [(4, 1), (16, 1)]
    return [(1, 1), (1, 2), *more]


def _measure(name: str, rows: int, cores: int, rounds: int) -> list[dict[str, Any]]:
    channels, columns = SHAPES[name]
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    calls: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, int] = {}
    errors: dict[str, float] = {}
    weight = torch.randn(channels, columns)
    weights = _copies(weight)
    calls[FLOAT] = lambda: [linear(x, w) for w in weights]
    counts = {FLOAT: len(weights)}
    sizes[FLOAT] = weight.nbytes
    if (made := _onednn(weight)) is not None:
        prepacked = [made] + [_onednn(weight) for _ in range(_count(weight.nbytes // 4) - 1)]
        calls[ONEDNN] = lambda: [torch.ops.quantized.linear_dynamic(x, w) for w in prepacked]
        counts[ONEDNN], sizes[ONEDNN] = len(prepacked), weight.nbytes // 4
    for format in FORMATS:
        if format.endswith("n") and columns % 256:
            continue
        one = _packed(format, channels, columns)
        copies = _copies(one)
        calls[format] = partial(_all, x, copies, format, channels)
        counts[format], sizes[format] = len(copies), one.nbytes
        errors[format] = _error(x, one, format, channels)
    ones = torch.ones(2**25)
    calls["read"] = ones.sum
    times = interleaved(calls, rounds)
    best = ones.nbytes / min(times.pop("read"))
    base = statistics.median(times[FLOAT]) / counts[FLOAT]
    found = []
    for key, samples in times.items():
        seconds = statistics.median(samples) / counts[key]
        low, _, high = statistics.quantiles(samples, n=4)
        found.append({
            "model": key, "test": f"{name} {channels}x{columns}, {rows} rows, threads {cores}",
            "us": seconds * 1e6, "± iqr": (high - low) / counts[key] / seconds,
            "MB": sizes[key] / 1e6, "GB/s": sizes[key] / seconds / 1e9,
            "of read": sizes[key] / seconds / best, "vs float32": base / seconds,
            "error": errors.get(key),
        })  # fmt: skip
    return found


def _all(x: Tensor, weights: list[Tensor], format: str, channels: int) -> None:
    for weight in weights:
        packed.linear(x, weight, None, format, channels)


def _count(size: int) -> int:
    return max(1, round(BYTES / size))


def _copies(weight: Tensor) -> list[Tensor]:
    return [weight, *(weight.clone() for _ in range(_count(weight.nbytes) - 1))]


def _onednn(weight: Tensor) -> Any:
    """int8 weights as torch's quantised linear layers take them; None where it has none."""
    try:
        torch.backends.quantized.engine = "onednn"
        scale = weight.abs().amax(1).double() / 127
        zero = torch.zeros(len(weight), dtype=torch.long)
        coded = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(coded, None)
    except (RuntimeError, AttributeError):
        return None


def _packed(format: str, channels: int, columns: int) -> Tensor:
    """A sample of rows in this format, as often as needed."""
    if format == "bfloat16":
        return torch.randn(channels, columns).to(torch.bfloat16)
    kind = parse(format)
    few = min(SAMPLE, channels)
    if kind.nested:
        sample = _nested(kind, few, columns)
    else:
        sample = round_to_nearest(torch.randn(few, columns), kind)[0]
    return sample.repeat(-(-channels // few), 1)[: channels // 16].contiguous()


def _nested(format: Format, rows: int, columns: int) -> Tensor:
    def integers(high: int, count: int) -> Tensor:
        return torch.randint(0, high, (rows, count), dtype=torch.uint8)

    groups, parts = format.groups(columns), {}
    for kind in format.kinds:
        parts[kind] = integers(64, groups)
        parts[f"super_{kind}"] = torch.rand(rows, columns // 256).mul_(1e-3).half()
    if not format.zero:
        parts["scale"] = parts["scale"].view(torch.int8)
    return pack(format, integers(2**format.bits, columns), **parts)


def _error(x: Tensor, weight: Tensor, format: str, channels: int) -> float:
    """Relative error of the product with the first channels, the weights' own rounding apart."""
    few = min(SAMPLE, channels)
    part = weight[: few if format == "bfloat16" else few // 16].contiguous()
    wanted = F.linear(x.double(), dequantize(part, format, few, x.shape[1]).double())
    found = packed.linear(x, part, None, format, few).double()
    return float((found - wanted).norm() / wanted.norm())


def _checks(rows: list[dict[str, Any]]) -> list[Check]:
    def least(column: str, format: str, cores: int) -> float | None:
        """The least value among one row's products with weights of more than a megabyte."""
        end = f"1 rows, threads {cores}"
        found = [
            r[column] for r in rows
            if r["model"] == format and r["test"].endswith(f", {end}") and r["MB"] > 1
        ]  # fmt: skip
        return min(found, default=None)

    checks = []
    for cores in (1, 2):
        for format in ("int8", "int8g32"):
            name = f"{format}: share of read bandwidth, least, threads {cores}"
            checks.append(Check.at_least(name, least("of read", format, cores), 0.7))
        for format in ("int4g32z", "int4g32zn"):
            name = f"{format} / float32, least, threads {cores}"
            checks.append(Check.at_least(name, least("vs float32", format, cores), 3.5))
    return checks
