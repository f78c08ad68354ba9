"""A model of SmolLM2's shape with random weights on a GPU: decode against eager and torch.compile.

Random weights, so that the suite runs where nothing can be downloaded: time does not depend on
them. The logits of every contender are compared first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from regraft.benchmarks.harness import Check, Result, environment, interleaved

EAGER, COMPILED, OURS = "eager", "torch.compile", "regraft"
SHAPE: dict[str, Any] = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192,
    tie_word_embeddings=True,
)  # fmt: skip
DEPTHS, PROMPT, ROUNDS = (128, 1024, 7000), 512, 60


def run(quick: bool) -> Result:
    from regraft import RegraftError

    if not torch.cuda.is_available():
        raise RegraftError("regraft bench cuda needs a CUDA device")
    rows: list[dict[str, Any]] = []
    checks: list[Check] = []
    dtypes = [torch.bfloat16] if quick else [torch.bfloat16, torch.float32]
    with torch.inference_mode():
        for dtype in dtypes:
            _measure(dtype, DEPTHS[1:2] if quick else DEPTHS, rows, checks)
    return Result(
        f"regraft bench cuda{' --quick' if quick else ''}", environment(), rows, checks, "tokens/s"
    )


def _measure(dtype: torch.dtype, depths: tuple[int, ...], rows: list, checks: list) -> None:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

    import regraft

    torch.manual_seed(0)
    name = str(dtype).removeprefix("torch.")
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model = model.to(device="cuda", dtype=dtype).eval()
    model.lm_head.weight.mul_(20)  # logits of a trained model's size
    start = time.perf_counter()
    ours = regraft.compile(model, target="cuda")
    seconds = time.perf_counter() - start
    torch._dynamo.reset()
    static = torch.compile(model, mode="reduce-overhead", fullgraph=False, dynamic=False)
    ids = torch.randint(3, SHAPE["vocab_size"], (1, 8192), device="cuda")
    caches: dict[str, Callable[[int], Any]] = {
        EAGER: lambda room: DynamicCache(config=model.config),
        COMPILED: lambda room: StaticCache(config=model.config, max_cache_len=room),
        OURS: lambda room: ours.new_cache(),
    }
    fills = {EAGER: model, COMPILED: model, OURS: ours}
    steps = {EAGER: model, COMPILED: static, OURS: ours}
    for depth in depths:
        held = {key: make(depth + ROUNDS + 8) for key, make in caches.items()}
        first: dict[str, torch.Tensor] = {}
        for key in held:
            for at in range(0, depth, 512):
                _call(fills[key], ids[:, at : min(at + 512, depth)], held[key])
            first[key] = _call(steps[key], ids[:, depth : depth + 1], held[key])
        scale = first[EAGER].abs().max()
        error = ((first[OURS] - first[EAGER]).abs().max() / scale).item()

        def timed(key: str, held: dict = held, depth: int = depth) -> Callable[[], None]:
            def function() -> None:
                _call(steps[key], ids[:, depth : depth + 1], held[key])
                torch.cuda.synchronize()

            return function

        found = _milliseconds({key: timed(key) for key in held}, ROUNDS)
        for key, (ms, sd) in found.items():
            rows.append(_row(name, key, "tg", depth, 1, ms, sd, seconds, error))
        for other in (EAGER, COMPILED):
            ratio = found[other][0] / found[OURS][0]
            target = 1.5 if other == EAGER else 1.0
            checks.append(Check.at_least(f"{name} decode at {depth} / {other}", ratio, target))
        limit = 1e-4 if dtype == torch.float32 else 3e-2
        checks.append(Check.at_most(f"{name} logits at {depth}, error", error, limit))

    def prefill(key: str) -> Callable[[], None]:
        def function() -> None:
            _call(fills[key], ids[:, :PROMPT], caches[key](PROMPT + 1))
            torch.cuda.synchronize()

        return function

    found = _milliseconds({key: prefill(key) for key in (EAGER, OURS)}, 10)
    for key, (ms, sd) in found.items():
        rows.append(_row(name, key, f"pp{PROMPT}", 0, PROMPT, ms, sd, seconds, None))
    ratio = found[EAGER][0] / found[OURS][0]
    checks.append(Check.at_least(f"{name} prefill / {EAGER}", ratio, 1.0))


def _milliseconds(functions: dict[str, Any], rounds: int) -> dict[str, tuple[float, float]]:
    seconds = interleaved(functions, rounds)
    return {
        key: (1000 * statistics.median(s), 1000 * statistics.pstdev(s)) for key, s in seconds.items()
    }


def _call(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits.float().clone()


def _row(dtype, model, test, depth, tokens, ms, sd, seconds, error) -> dict[str, Any]:
    return {
        "model": model,
        "dtype": dtype,
        "test": test,
        "depth": depth,
        "ms": ms,
        "tokens/s": 1000 * tokens / ms,
        "sd": sd,
        "compile s": seconds if model == OURS else None,
        "error": error if model == OURS else None,
    }
