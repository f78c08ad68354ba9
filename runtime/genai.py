"""The settings that onnxruntime-genai keeps beside a model, as transformers' configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regraft.program import RegraftError

GENAI = "genai_config.json"
SIZES = {
    "head_dim": "head_size",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_hidden_layers": "num_hidden_layers",
    "num_key_value_heads": "num_key_value_heads",
}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SEARCH = ("do_sample", "num_beams", "repetition_penalty", "temperature", "top_k", "top_p")


def genai_configurations(folder: Path) -> tuple[Any, Any]:
    """The configuration of the model of genai_config.json and of its generation; RegraftError
    where the file is damaged."""
    from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

    try:
        settings = json.loads((folder / GENAI).read_text())
        model, search = settings["model"], settings.get("search", {})
        decoder = model["decoder"]
        known = {name: decoder[other] for name, other in SIZES.items() if other in decoder}
        known |= {"vocab_size": model["vocab_size"]}
        tokens = {name: model[name] for name in TOKENS if name in model}
        kind = CONFIG_MAPPING[model["type"]] if model["type"] in CONFIG_MAPPING else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RegraftError(
            f"{folder / GENAI} is damaged ({type(error).__name__}: {error}): export it again"
        ) from error
    config = (kind or PreTrainedConfig)(**known, **tokens)
    chosen = {name: search[name] for name in SEARCH if name in search}
    return config, GenerationConfig(**tokens, **chosen)
