"""SmolLM2 on two threads: prefill and decode against eager transformers and torch.compile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import regraft
from regraft.benchmarks.harness import Check, Result, environment, interleaved, threads

EAGER, COMPILED, DENSE, QUANTIZED = "eager", "torch.compile", "regraft dense", "regraft 4-bit"
PROMPT, CHUNK, THREADS = 512, 512, 2
DEPTHS = (0, 1024, 8000)


class _Contender:
    """One way to run the model: ``step`` is timed, ``fill`` only prepares a cache."""

    def __init__(self, step: Any, fill: Any, new_cache: Callable[[int], Any], seconds: float):
        self.step, self.fill, self.new_cache, self.seconds = step, fill, new_cache, seconds

    def filled(self, ids: torch.Tensor, depth: int, room: int) -> Any:
        cache = self.new_cache(depth + room)
        for start in range(0, depth, CHUNK):
            _call(self.fill, ids[:, start : min(start + CHUNK, depth)], cache)
        return cache


def run(quick: bool) -> Result:
    with threads(THREADS), torch.inference_mode():
        return _run(quick)


def _run(quick: bool) -> Result:
    from transformers import AutoModelForCausalLM

    from regraft.assets import smollm2

    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    contenders, absent = _contenders(model, quick)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, 8192), generator=generator)
    rows = _prefill(contenders, ids, 3 if quick else 5)
    for depth in (1024,) if quick else DEPTHS:
        rows += _decode(contenders, ids, depth, 10 if quick else 20)
    for name, reason in absent.items():
        rows.append(_row(name, f"absent: {reason}"))
    return Result(
        f"regraft bench decode{' --quick' if quick else ''}",
        environment(),
        rows,
        _checks(model.config, contenders, rows),
        chart="tokens/s",
    )


def _contenders(model: Any, quick: bool) -> tuple[dict[str, _Contender], dict[str, str]]:
    from transformers import DynamicCache

    found = {EAGER: _Contender(model, model, lambda room: DynamicCache(config=model.config), 0.0)}
    absent = {}
    if quick:
        absent[COMPILED] = "skipped with --quick"
    else:
        try:
            found[COMPILED] = _torch_compiled(model)
        except Exception as error:
            absent[COMPILED] = (str(error) or type(error).__name__).splitlines()[0][:80]
    passes = {DENSE: [], QUANTIZED: [regraft.KVQuant(bits=4)]}
    for name, asked in passes.items():
        start = time.perf_counter()
        compiled = regraft.compile(model, asked)
        seconds = time.perf_counter() - start
        found[name] = _Contender(compiled, compiled, _cache_of(compiled), seconds)
    return found, absent


def _cache_of(compiled: Any) -> Callable[[int], Any]:
    return lambda room: compiled.new_cache()


def _torch_compiled(model: Any) -> _Contender:
    """Its seconds are those of the first decode step; other shapes compile while warming up."""
    from transformers import StaticCache

    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 32
    step = torch.compile(model, dynamic=False)

    def new_cache(room: int) -> Any:
        return StaticCache(config=model.config, max_cache_len=room)

    cache = new_cache(CHUNK)
    _call(model, torch.ones(1, 1, dtype=torch.long), cache)
    start = time.perf_counter()
    _call(step, torch.ones(1, 1, dtype=torch.long), cache)
    return _Contender(step, model, new_cache, time.perf_counter() - start)


def _call(model: Any, ids: torch.Tensor, cache: Any) -> None:
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _prefill(contenders: dict[str, _Contender], ids: torch.Tensor, rounds: int) -> list[dict]:
    def function(contender: _Contender) -> Callable[[], None]:
        return lambda: _call(contender.step, ids[:, :PROMPT], contender.new_cache(PROMPT))

    timed = interleaved({name: function(one) for name, one in contenders.items()}, rounds)
    return [
        _row(name, f"pp{PROMPT}", 0, PROMPT, timed[name][0], timed[name][1], None, one.seconds)
        for name, one in contenders.items()
    ]


def _decode(contenders: dict[str, _Contender], ids: torch.Tensor, depth: int, rounds: int) -> list:
    caches = {name: one.filled(ids, depth, rounds + 1) for name, one in contenders.items()}

    def function(name: str) -> Callable[[], None]:
        return lambda: _call(contenders[name].step, ids[:, -1:], caches[name])

    timed = interleaved({name: function(name) for name in contenders}, rounds)
    rows = []
    for name, one in contenders.items():
        size = _bytes(caches[name]) / (depth + rounds + 1)
        rows.append(_row(name, "tg", depth, 1, timed[name][0], timed[name][1], size, one.seconds))
    return rows


def _bytes(cache: Any) -> int:
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _row(
    model: str,
    test: str,
    depth: int | None = None,
    tokens: int = 1,
    ms: float | None = None,
    sd: float | None = None,
    cache: float | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    return {
        "model": model,
        "test": test,
        "depth": depth,
        "ms": ms,
        "tokens/s": None if ms is None else 1000 * tokens / ms,
        "sd": sd,
        "kv bytes/token": cache,
        "compile s": seconds,
    }


def _checks(config: Any, contenders: dict[str, _Contender], rows: list[dict]) -> list[Check]:
    ms = {(row["model"], row["test"], row["depth"]): row["ms"] for row in rows}
    kept = {(row["model"], row["depth"]): row["kv bytes/token"] for row in rows}
    half = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2

    def speedup(over: str, test: str, depth: int) -> float | None:
        theirs, ours = ms.get((over, test, depth)), ms.get((DENSE, test, depth))
        return theirs / ours if theirs and ours else None

    deep = kept.get((QUANTIZED, DEPTHS[-1]))
    slowest = max(contenders[DENSE].seconds, contenders[QUANTIZED].seconds)
    prefill = f"pp{PROMPT}"
    return [
        Check.at_least("decode at 1K, dense / eager", speedup(EAGER, "tg", 1024), 1.5),
        Check.at_least("decode at 1K, dense / torch.compile", speedup(COMPILED, "tg", 1024), 1.4),
        Check.at_least("decode at 8K, dense / eager", speedup(EAGER, "tg", DEPTHS[-1]), 1.5),
        Check.at_least("prefill, dense / eager", speedup(EAGER, prefill, 0), 1.0),
        Check.at_least("prefill, dense / torch.compile", speedup(COMPILED, prefill, 0), 1.0),
        Check.at_most("compile seconds", slowest, 30),
        Check.at_most("4-bit cache at 8K / float16", deep / half if deep else None, 0.3),
    ]
