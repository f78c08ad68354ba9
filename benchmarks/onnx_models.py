"""How many causal language models of transformers export to ONNX and compute the same there."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from regraft.benchmarks.capture import QUICK, fresh
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
        "recurrent": sum("recurrent" in item["reason"] for item in found.values()),
        "exported": sum(item["error"] is not None for item in found.values()),
    }
    rest = counts["captured"] - counts["recurrent"]
    return Result(
        f"regraft bench onnx-models{' --quick' if quick else ''}",
        environment(),
        [{"stage": stage, "count": count} for stage, count in counts.items()],
        [
            Check.at_least(
                f"share exported and equal of the {rest} captured without recurrent layers",
                counts["exported"] / max(1, rest),
                0.95,
            )
        ],
        chart="count",
        extra={"architectures": found},
    )


def export_one(model_type: str) -> dict[str, Any]:
    """Export a small random model of this type, which compares it under onnxruntime.

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
    except Exception as error:
        outcome["reason"] = one_line(error)
    return outcome


def _outcome(reason: str = "", runs: bool = False) -> dict[str, Any]:
    return {"captured": runs, "error": None, "reason": reason[:160]}
