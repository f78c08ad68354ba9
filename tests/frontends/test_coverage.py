"""The committed table of `regraft bench capture` names every type and is still true."""

import json
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from regraft.benchmarks.capture import capture_one, holds

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "capture.json"
ARCHITECTURES = json.loads(TABLE.read_text())["architectures"]


HOLDING = sorted(name for name, entry in ARCHITECTURES.items() if holds(entry))


def test_every_causal_language_model_type_is_tested():
    missing = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(ARCHITECTURES))
    assert not missing, f"run `regraft bench capture`: {', '.join(missing)}"


def test_each_type_holds_or_says_why():
    silent = [n for n, entry in ARCHITECTURES.items() if not holds(entry) and not entry["reason"]]
    assert not silent
    assert all(not ARCHITECTURES[name]["reason"] for name in HOLDING)


@pytest.mark.parametrize(
    "name",
    [
        "bert",  # a buffer expanded to a symbolic batch
        "bart",  # positions counted from the length of the cache
        "whisper",  # no position ids in its signature
        "qwen2_moe",  # sizes that a router computes
        "llama4_text",  # chunked attention, where chunks start after the padding
        "gemma3n_text",  # layers that read the cache of another
        "jetmoe",  # heads that are tiled, not repeated in place
    ],
)
def test_typeholds(name):
    assert holds(capture_one(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", HOLDING)
def test_type_stillholds(name):
    outcome = capture_one(name)
    assert holds(outcome), outcome["reason"]
