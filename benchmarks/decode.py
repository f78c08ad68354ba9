"""SmolLM2 on two threads: prefill and decode, in the rows of llama-bench."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.benchmarks.contenders import (
    COMPILED,
    DENSE,
    EAGER,
    LLAMA,
    NAMES,
    ONNX,
    PACKED,
    PROMPT,
    QUANTIZED,
    THREADS,
    Contender,
    build,
    cache_folders,
    generate,
    probe_fresh,
)
from regraft.benchmarks.harness import (
    Check,
    Result,
    environment,
    interleaved,
    progress,
    threads,
)
from regraft.program import RegraftError

DEPTHS, ROOM = (0, 1024, 8000), 1280
GENERATED, BLOCK, CHUNK, REPEATS = 128, 16, 512, 5
QUICK = (EAGER, DENSE, QUANTIZED, *PACKED, LLAMA)


def run(quick: bool, onnx: Path | None = None) -> Result:
    """Blocks of generated tokens and prompts are timed in turn, one contender after the other.

    Seconds of compiling and peaks of memory are those of fresh processes, the first with empty
    caches (cold), the second with what it left (warm). ``onnx`` is a folder with a model.onnx.
    """
    with threads(THREADS), torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
        return _run(quick, onnx, Path(scratch))


def _run(quick: bool, onnx: Path | None, scratch: Path) -> Result:
    from transformers import AutoModelForCausalLM

    from regraft.assets import smollm2, smollm2_gguf

    folder, gguf = smollm2(), smollm2_gguf()
    names = QUICK if quick else NAMES
    depths = (1024,) if quick else DEPTHS
    stages = len(names) * (1 if quick else 3) + 1 + len(depths)
    with progress("decode", stages) as stage:
        probes, absent = ({}, {}) if quick else _probes(names, folder, onnx, gguf, scratch, stage)
        absent |= {name: "skipped with --quick" for name in NAMES if name not in names}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        contenders = {}
        with _environment({} if quick else cache_folders(scratch)):
            for name in names:
                stage(f"compile {name}")
                try:
                    if name not in absent:
                        contenders[name] = build(name, model, onnx, gguf)
                except RegraftError as error:
                    absent[name] = str(error)
            stage(f"pp{PROMPT}")
            times = _prefill(contenders, 2 if quick else REPEATS)
            for depth in depths:
                stage(f"tg at {depth}")
                times |= _decode(contenders, depth, 2 * BLOCK if quick else GENERATED)
    rows = [_row(key, found, probes.get(key[0], {})) for key, found in times.items()]
    rows += [_row((name, f"absent: {reason}", None), {}, {}) for name, reason in absent.items()]
    return Result(
        f"regraft bench decode{' --quick' if quick else ''}",
        environment(),
        rows,
        _checks(model.config, rows),
        chart="t/s",
    )


def _probes(
    names: tuple[str, ...],
    folder: Path,
    onnx: Path | None,
    gguf: Path,
    scratch: Path,
    stage: Callable[[str], None],
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """What a fresh process costs, and the reason of each contender that does not run."""
    probes, absent = {}, {}
    for name in names:
        stage(f"cold {name}")
        if name == ONNX and onnx is None:
            absent[name] = "no export given (--onnx FOLDER)"
            continue
        try:
            cold = probe_fresh(name, folder, onnx, scratch, gguf)
            stage(f"warm {name}")
            warm = cold if name == EAGER else probe_fresh(name, folder, onnx, scratch, gguf)
        except RegraftError as error:
            absent[name] = str(error)
            continue
        probes[name] = {
            "peak MiB": warm["peak MiB"],
            "compile cold s": max(0.0, cold["first"] - cold["later"]),
            "compile warm s": max(0.0, warm["first"] - warm["later"]),
        }
    return probes, absent


def _prefill(contenders: dict[str, Contender], repeats: int) -> dict:
    ids = _ids(PROMPT)
    caches = {name: one.new_cache(PROMPT) for name, one in contenders.items()}

    def prompt(name: str) -> None:
        caches[name].reset()
        contenders[name].call(ids, caches[name])

    timed = interleaved({name: lambda name=name: prompt(name) for name in contenders}, repeats)
    return {
        (name, f"pp{PROMPT}", 0): {"speeds": [PROMPT / seconds for seconds in samples]}
        for name, samples in timed.items()
    }


def _decode(contenders: dict[str, Contender], depth: int, count: int) -> dict:
    """``count`` greedy tokens after ``depth``, in blocks; two tokens before them go untimed."""
    ids, caches = _fill(contenders, depth, depth + count + 2)
    last = {name: generate(one, ids, caches[name], 2) for name, one in contenders.items()}

    def block(name: str) -> None:
        last[name] = generate(contenders[name], last[name], caches[name], BLOCK)

    turns = {name: lambda name=name: block(name) for name in contenders}
    timed = interleaved(turns, count // BLOCK, warm=False)
    return {
        (name, f"tg{count}", depth): {
            "speeds": [BLOCK / seconds for seconds in samples],
            "kv bytes/token": _bytes(caches[name]) / (depth + count + 2),
        }
        for name, samples in timed.items()
    }


def _fill(contenders: dict[str, Contender], depth: int, tokens: int) -> tuple[Tensor, dict]:
    """The next ids and caches of this depth: computed by Regraft, copied for the others."""
    caches = {name: one.new_cache(max(tokens, ROOM)) for name, one in contenders.items()}
    ids = _ids(depth + 1)
    if depth:
        layers = None
        for name, one in sorted(contenders.items(), key=lambda item: item[0] != DENSE):
            if one.take is not None and layers is not None:
                one.take(caches[name], layers)
                continue
            for start in range(0, depth, CHUNK):
                one.call(ids[:, start : min(start + CHUNK, depth)], caches[name])
            if name == DENSE:
                layers = [(layer.key, layer.value) for layer in caches[name].state.layers]
    return ids[:, -1:], caches


def _ids(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 256, (1, 8192), generator=generator)[:, :count]


def _bytes(cache: Any) -> int:
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _row(key: tuple, found: dict[str, Any], cost: dict[str, float]) -> dict[str, Any]:
    speeds = found.get("speeds")
    return {
        "model": key[0],
        "test": key[1],
        "depth": key[2],
        "t/s": statistics.median(speeds) if speeds else None,
        "± sd": statistics.stdev(speeds) if speeds else None,
        "kv bytes/token": found.get("kv bytes/token"),
        "peak MiB": cost.get("peak MiB"),
        "compile cold s": cost.get("compile cold s"),
        "compile warm s": cost.get("compile warm s"),
    }


def _checks(config: Any, rows: list[dict]) -> list[Check]:
    speed = {(row["model"], row["test"][:2], row["depth"]): row["t/s"] for row in rows}
    kept = {(row["model"], row["depth"]): row["kv bytes/token"] for row in rows}
    cost = {row["model"]: (row["compile cold s"], row["compile warm s"]) for row in rows}
    half = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    deepest = DEPTHS[-1]

    def gain(over: str, test: str, depth: int, name: str = DENSE) -> float | None:
        ours, theirs = speed.get((name, test, depth)), speed.get((over, test, depth))
        return ours / theirs if ours and theirs else None

    packed, packed_cache = PACKED
    deep = kept.get((QUANTIZED, deepest))
    cold, warm = cost[DENSE]
    return [
        Check.at_least("decode at 1K, dense / eager", gain(EAGER, "tg", 1024), 1.5),
        Check.at_least("decode at 1K, dense / torch.compile", gain(COMPILED, "tg", 1024), 1.4),
        Check.at_least("decode at 8K, dense / eager", gain(EAGER, "tg", deepest), 1.5),
        Check.at_least(
            "decode at 8K, 4-bit / torch.compile", gain(COMPILED, "tg", deepest, QUANTIZED), 2.0
        ),
        Check.at_least("prefill, dense / eager", gain(EAGER, "pp", 0), 1.0),
        Check.at_least("prefill, dense / torch.compile", gain(COMPILED, "pp", 0), 1.0),
        Check.at_least("decode at 1K, packed / llama.cpp", gain(LLAMA, "tg", 1024, packed), 1.0),
        Check.at_least(
            "decode at 8K, packed, 4-bit cache / llama.cpp",
            gain(LLAMA, "tg", deepest, packed_cache),
            1.8,
        ),
        Check.at_least("prefill, packed / llama.cpp", gain(LLAMA, "pp", 0, packed), 1.0),
        Check.at_most("compile seconds, cold", cold, 30),
        Check.at_most("compile seconds, warm", warm, 5),
        Check.at_most("4-bit cache at 8K / float16", deep / half if deep else None, 0.3),
    ]
