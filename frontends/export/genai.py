"""What onnxruntime-genai reads beside a model."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from regraft.program import CacheSpec

STATES = ("conv_state", "recurrent_state")


def fits(cache: CacheSpec) -> bool:
    """Whether onnxruntime-genai can keep this cache: exact keys and values, and of recurrent
    states at most a convolution's and a recurrence's a layer."""
    names = [spec.name.split(".")[1:] for spec in cache.states]
    known = all(len(name) == 2 and name[0].isdigit() and name[1] in STATES for name in names)
    return known and all(layer.format == "dense" for layer in cache.layers)


def genai_config(config: Any, generation: Any, graph: ir.Graph) -> dict[str, Any]:
    """The settings that onnxruntime-genai reads."""
    text = config.get_text_config(decoder=True)
    tokens = {
        kind: next(
            (n for c in (generation, config, text) if (n := getattr(c, f"{kind}_token_id", None))
             is not None),
            None,
        )
        for kind in ("bos", "eos", "pad")
    }  # fmt: skip
    ends = tokens["eos"]
    pad = (
        tokens["pad"] if tokens["pad"] is not None else ends[0] if isinstance(ends, list) else ends
    )
    caches = [v for v in graph.inputs if str(v.name).startswith("past_key_values.")]
    keys = [v for v in caches if str(v.name).endswith(".key")]
    longest = getattr(text, "max_position_embeddings", 2048)
    shared = int(keys[0].shape[1]) if keys else 0  # type: ignore[index, arg-type]
    head = int(keys[0].shape[3]) if keys else 0  # type: ignore[index, arg-type]
    own = [v.name for v in graph.inputs if v not in caches]
    states = [kind for kind in STATES if any(str(v.name).endswith(kind) for v in caches)]
    kinds = ["key", "value", *states]
    count = len(keys) if not states else text.num_hidden_layers
    hybrid: dict[str, Any] = {}
    if states:
        hybrid["layer_types"] = list(getattr(text, "layer_types", None) or [])
        conv = next((v for v in caches if str(v.name).endswith(STATES[0])), None)
        if conv is not None:
            hybrid["conv_cache_size"] = int(conv.shape[2])  # type: ignore[index, arg-type]
    return {
        "model": {
            "bos_token_id": tokens["bos"] or 0,
            "eos_token_id": ends,
            "pad_token_id": pad,
            "context_length": longest,
            "type": config.model_type,
            "vocab_size": text.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": head,
                "hidden_size": getattr(text, "hidden_size", 0),
                "num_attention_heads": getattr(text, "num_attention_heads", shared),
                "num_hidden_layers": count,
                "num_key_value_heads": shared,
                "inputs": {name: name for name in own} | _names("past", "past_key_values", kinds),
                "outputs": {"logits": "logits"} | _names("present", "present", kinds),
            }
            | hybrid,
        },
        "search": {
            "do_sample": bool(generation.do_sample),
            "early_stopping": True,
            "max_length": longest,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": generation.repetition_penalty or 1.0,
            "temperature": generation.temperature or 1.0,
            "top_k": generation.top_k or 50,
            "top_p": generation.top_p or 1.0,
        },
    }


def _names(kind: str, prefix: str, parts: list[str]) -> dict[str, str]:
    """{"past_key_names": "past_key_values.%d.key"}"""
    return {f"{kind}_{part.removesuffix('_state')}_names": f"{prefix}.%d.{part}" for part in parts}
