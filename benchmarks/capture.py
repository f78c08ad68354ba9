"""How many causal language models of transformers compile and compute the same logits."""

from __future__ import annotations

import inspect
import math
import os
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from regraft.benchmarks.harness import Check, Result, environment
from regraft.benchmarks.small_models import one_line, small_model
from regraft.benchmarks.survey import survey

QUICK = ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "phi3", "mistral", "olmo2", "gptj",
         "smollm3", "bert", "mixtral")  # fmt: skip
TOLERANCE = 1e-5


def run(quick: bool, names: list[str] | None = None) -> Result:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    types = list(names or (QUICK if quick else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    found = survey(types, capture_one, _outcome, "capture")
    found = {name: found[name] for name in types}
    running = sum(item["runs"] for item in found.values())
    holding = sum(holds(item) for item in found.values())
    counts = {
        "types": len(types),
        "a small configuration runs": running,
        "captured": sum(item["captured"] for item in found.values()),
        "raised": sum(item["raised"] for item in found.values()),
        "with rotary embedding": sum(item["rope"] for item in found.values()),
        "hold": holding,
    }
    return Result(
        f"regraft bench capture{' --quick' if quick else ''}",
        environment(),
        [{"stage": stage, "count": count} for stage, count in counts.items()],
        [
            Check.at_least(
                f"share that holds of the {running} types (of {len(types)}) that run small",
                holding / max(1, running),
                0.9,
            )
        ],
        chart="count",
        extra={"architectures": found},
    )


def capture_one(model_type: str) -> dict[str, Any]:
    """Compile a small random model of this type and compare it with eager transformers."""
    import torch

    import regraft

    outcome = _outcome()
    torch.manual_seed(0)
    try:
        with torch.no_grad(), fresh():
            model = small_model(model_type)
            outcome["runs"] = True
            compiled = regraft.compile(model, fallback="error")
            outcome["captured"] = True
            graph = compiled.program.graph
            target = torch.ops.regraft.cached_attention.default
            nodes = graph.find_nodes(op="call_function", target=target)
            outcome["raised"] = len(nodes) == len(compiled.program.cache.layers)
            outcome["rope"] = any(node.args[6] is not None for node in nodes)
            error = _compare(model, compiled)
        outcome["max_abs_error"] = error if math.isfinite(error) else None
        if not error <= TOLERANCE:
            outcome["reason"] = f"logits differ by {error:.1e} of their scale"
        elif not outcome["raised"]:
            outcome["reason"] = _first_skipped(compiled.report)
    except Exception as error:
        outcome["reason"] = one_line(error)
    return outcome


@contextmanager
def fresh():
    """No program of an earlier run, and no C++ compiler: every operator runs on its own."""
    names = ("REGRAFT_CACHE", "REGRAFT_INDUCTOR")
    before = {name: os.environ[name] for name in names if name in os.environ}
    with TemporaryDirectory(prefix="regraft-") as folder:
        os.environ.update(REGRAFT_CACHE=folder, REGRAFT_INDUCTOR="0")
        try:
            yield
        finally:
            for name in names:
                os.environ.pop(name)
            os.environ.update(before)


def _outcome(reason: str = "", runs: bool = False) -> dict[str, Any]:
    empty = {"runs": runs, "captured": False, "raised": False, "rope": False}
    return {**empty, "max_abs_error": None, "reason": reason[:160]}


def _first_skipped(report: Any) -> str:
    skipped = [entry for row in report.rows for entry in row.skipped if row.name[:5] == "Raise"]
    return next(
        (f"{where}: {why}" for where, why in skipped if "rotation" not in where),
        "some attention was not raised",
    )


def holds(item: dict[str, Any]) -> bool:
    """Captured with every attention raised, and the logits within the tolerance."""
    error = item["max_abs_error"]
    return item["raised"] and error is not None and error <= TOLERANCE


def _compare(model: Any, compiled: Any) -> float:
    """Largest difference of logits over prefill, decode and a step after cropping the cache."""
    import torch

    limit = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(3, limit, (2, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    accepted = inspect.signature(model.forward).parameters

    def eager(start: int, stop: int, **extra: Any) -> Any:
        if "position_ids" in accepted:
            extra["position_ids"] = positions[:, start:stop]
        return model(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], **extra)

    def whole(start: int, stop: int) -> Any:
        return eager(0, stop, use_cache=False).logits[:, start:]

    carried = "past_key_values" in accepted and "past_key_values" in eager(0, 1, use_cache=True)
    scale, worst, past, cache = 0.0, 0.0, None, compiled.new_cache()

    def note(expected: Any, got: Any, seen: Any) -> None:
        nonlocal scale, worst
        expected, got = expected[seen.bool()], got[seen.bool()]
        scale = max(scale, expected.abs().max().item())
        difference = (expected - got).abs().max().item()
        worst = difference if not difference <= worst else worst

    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9)):
        if carried:
            output = eager(start, stop, past_key_values=past, use_cache=True)
            past, expected = output.past_key_values, output.logits
        else:
            expected = whole(start, stop)
        got = compiled(ids[:, start:stop], mask[:, :stop], past_key_values=cache)
        note(expected, got.logits, mask[:, start:stop])
    cache.crop(-2)
    ids[:, 7] = ids[:, 9]
    got = compiled(ids[:, 7:8], mask[:, :8], past_key_values=cache)
    note(whole(7, 8), got.logits, mask[:, 7:8])
    return worst / scale
