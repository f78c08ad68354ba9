"""How many causal language models of transformers compute the same as ONNX models and back."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from regraft.benchmarks.capture import QUICK, TOLERANCE, fresh
from regraft.benchmarks.harness import Check, Result, environment
from regraft.benchmarks.small_models import one_line, small_model
from regraft.benchmarks.survey import survey


def run(quick: bool, names: list[str] | None = None) -> Result:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    types = list(names or (QUICK if quick else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    found = survey(types, export_one, _outcome, "export")
    found = {name: found[name] for name in types}
    counts = {
        "types": len(types),
        "captured": sum(item["captured"] for item in found.values()),
        "exported": sum(item["error"] is not None for item in found.values()),
        "imported again and equal": sum(_equal(item) for item in found.values()),
    }
    return Result(
        f"regraft bench onnx-models{' --quick' if quick else ''}",
        environment(),
        [{"stage": stage, "count": count} for stage, count in counts.items()],
        [
            Check.at_least(
                f"share exported and equal of the {counts['captured']} captured",
                counts["exported"] / max(1, counts["captured"]),
                0.95,
            ),
            Check.at_least(
                "share of these that are equal when imported again",
                counts["imported again and equal"] / max(1, counts["exported"]),
                0.95,
            ),
        ],
        chart="count",
        extra={"architectures": found},
    )


def _equal(item: dict[str, Any]) -> bool:
    return item["round_trip"] is not None and item["round_trip"] <= TOLERANCE


def export_one(model_type: str) -> dict[str, Any]:
    """Export a small random model of this type, which compares it under onnxruntime, and import it.

    Weights that are zero become random: experts would tie, and ties are broken in either way.
    """
    import torch

    import regraft

    outcome = _outcome()
    torch.manual_seed(0)
    try:
        with torch.no_grad(), fresh(), TemporaryDirectory() as scratch:
            model = small_model(model_type)
            for weight in model.parameters():
                if weight.is_floating_point() and not weight.any():
                    weight.normal_(0, 0.02)
            compiled = regraft.compile(model, target="reference")
            outcome["captured"] = True
            written = compiled.export_onnx(Path(scratch) / "out")
            outcome["error"] = max(written.errors.values())
            imported = regraft.compile(Path(scratch) / "out", target="reference")
            outcome["round_trip"] = difference(compiled, imported)
    except Exception as error:
        outcome["reason"] = one_line(error)
    return outcome


def difference(compiled: Any, imported: Any) -> float:
    """Of the logits, over the largest, in a prompt and two steps behind it."""
    import torch

    limit = compiled.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(3, limit, (2, 9), generator=torch.Generator().manual_seed(1))
    caches, worst = (compiled.new_cache(), imported.new_cache()), 0.0
    for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
        want, got = (
            model(part, past_key_values=cache).logits
            for model, cache in zip((compiled, imported), caches, strict=True)
        )
        worst = max(worst, float((want - got).abs().max() / want.abs().max()))
    return worst


def _outcome(reason: str = "", runs: bool = False) -> dict[str, Any]:
    return {"captured": runs, "error": None, "round_trip": None, "reason": reason[:160]}
