"""A small random model of every causal language model type of transformers.

Sizes shrink by the names that configurations share; per-layer lists keep one layer of each kind,
so that a hybrid model keeps both its attention and its recurrent layers.
"""

from __future__ import annotations

from itertools import product
from typing import Any

LARGEST, KINDS = 60_000_000, 4

_SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, head_dim=16, vocab_size=256, max_position_embeddings=512,
              sliding_window=5, attention_chunk_size=5,
              pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
_GPT2 = dict(n_embd=64, n_layer=2, n_head=4, n_positions=512, n_inner=128, n_ctx=512,
             rotary_dim=8, vocab_size=256, pad_token_id=0)  # fmt: skip
_BART = dict(d_model=64, decoder_layers=2, encoder_layers=2, num_decoder_layers=2,
             num_encoder_layers=2, decoder_attention_heads=4,
             encoder_attention_heads=4, decoder_ffn_dim=128, encoder_ffn_dim=128,
             ffn_dim=128, ffn_hidden_size=128, word_embed_proj_dim=64,
             embedding_size=64)  # fmt: skip
_EXPERTS = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
                n_shared_experts=1,
                moe_intermediate_size=32, shared_expert_intermediate_size=32, n_group=1,
                topk_group=1, moe_num_experts=4, moe_k=2, moe_topk=2)  # fmt: skip
_LATENT = dict(q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
               v_head_dim=16)  # fmt: skip
_RECURRENT = dict(chunk_size=16, mamba_chunk_size=16, mamba_d_state=16, ssm_state_size=16,
                  linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
                  linear_value_head_dim=16)  # fmt: skip
_ALL = {**_SMALL, **_GPT2, **_BART, **_EXPERTS, **_LATENT, **_RECURRENT}
_SETS: tuple[dict[str, Any], ...] = (
    _ALL,
    {**_ALL, "num_key_value_heads": 4},
    {k: v for k, v in _ALL.items() if k != "head_dim"},
    {k: v for k, v in _ALL.items() if k != "head_dim"} | {"num_key_value_heads": 4},
    {k: v for k, v in _ALL.items() if k not in _EXPERTS},
    {**_SMALL, **_GPT2},
    _SMALL,
    {k: v for k, v in _SMALL.items() if k != "pad_token_id"},
)

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# what a type needs beyond the sizes above: layers of each kind, widths that must agree
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1], mamba_n_heads=8),
    "blt": dict(num_hidden_layers=2, encoder_hash_byte_group_vocab=64, patching_mode="space"),
    "blt_local_encoder": dict(hidden_size_global=64),
    "blt_local_decoder": dict(hidden_size_global=64),
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": _ROPE, "full_attention": _ROPE},
    ),
    "dbrx": dict(attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}),
    "dots3_note_text": dict(
        num_key_value_heads=4, swa_num_attention_heads=4, swa_num_key_value_heads=4,
        swa_q_lora_rank=32, swa_kv_lora_rank=16, swa_head_dim=16, swa_qk_nope_head_dim=8,
        swa_v_head_dim=16, index_head_dim=16, index_n_heads=4, index_topk=16,
        shared_experts_intermediate_size=32,
    ),
    "dots3_note_vision_encoder": dict(
        adapter_in_dim=64, adapter_out_dim=64, mlp_layer_types=["dense", "sparse"],
    ),
    "dots3_note_audio_encoder": dict(adapter_input_size=64, adapter_out_dim=64),
    "gemma3n_text": dict(
        num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2, activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0],
        hidden_size_per_layer_input=16, vocab_size_per_layer_input=256, laurel_rank=8,
    ),
    "gemma4_text": dict(
        hidden_size_per_layer_input=16, vocab_size_per_layer_input=256, global_head_dim=32,
    ),
    "gemma4_unified_text": dict(global_head_dim=32),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=5),
    "granitemoehybrid": dict(
        layer_types=["linear_attention", "full_attention"], mamba_n_heads=8,
    ),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "longcat_flash": dict(head_dim=8, num_hidden_layers=4),
    "mamba2": dict(num_heads=8),
    # its eager cache drops keys beyond the window that its mask still shows
    "moshi": dict(sliding_window=512),
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=16,
        indexer_compress_ratio=4,
    ),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "reformer": dict(
        attn_layers=["local", "lsh"], axial_pos_shape=[16, 32], axial_pos_embds_dim=[32, 32],
    ),
    "xlstm": dict(num_heads=4, qk_dim_factor=1.0, mode="inference"),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(
        num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2,
    ),
}  # fmt: skip


def small_model(model_type: str) -> Any:
    """The first keyword set whose model builds and runs; RuntimeError with the first reason."""
    import torch
    from transformers import AutoModelForCausalLM

    reason = ""
    for wanted, listed in product(_SETS, (True, False)):
        try:
            config = _config(model_type, wanted, listed)
            with torch.device("meta"):
                size = AutoModelForCausalLM.from_config(config).num_parameters()
            if size > LARGEST:
                raise ValueError(f"{size / 1e6:.0f}M parameters are too many")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[0, 1, 1], [1, 1, 1]])
            model(input_ids=ids, attention_mask=mask, use_cache=True)
            return model
        except Exception as error:
            reason = reason or one_line(error)
    raise RuntimeError(f"no small configuration runs: {reason}")


def _config(model_type: str, wanted: dict[str, Any], listed: bool) -> Any:
    from transformers import AutoConfig

    default = AutoConfig.for_model(model_type)
    return AutoConfig.for_model(model_type, **_settings(default, wanted, listed))


def _settings(default: Any, wanted: dict[str, Any], listed: bool) -> dict[str, Any]:
    """The keywords that shrink this configuration and, in turn, each one inside it."""
    known = default.to_dict()
    names = known.keys() | default.attribute_map.keys()
    settings = {key: value for key, value in wanted.items() if key in names}
    if "is_decoder" in known:
        settings["is_decoder"] = True
    if listed:
        settings |= _layer_lists(known, wanted)
    for name in default.sub_configs:
        inner = getattr(default, name, None)
        if inner is not None:
            settings[name] = _settings(inner, wanted, listed) | {"model_type": inner.model_type}
    return settings | _SPECIAL.get(default.model_type, {})


def _layer_lists(known: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Per-layer lists shortened to one layer of each kind, at least two layers."""
    count = known.get("num_hidden_layers")
    lists = {
        key: value
        for key, value in known.items()
        if isinstance(value, list) and len(value) == count and key not in wanted
        and all(isinstance(item, (str, int, float)) for item in value)
    }  # fmt: skip
    kinds = {key: list(dict.fromkeys(value)) for key, value in lists.items()}
    kinds = {key: kind for key, kind in kinds.items() if len(kind) <= KINDS}
    if not kinds:
        return {}
    layers = max(2, *map(len, kinds.values()))
    short = {key: [kind[i % len(kind)] for i in range(layers)] for key, kind in kinds.items()}
    return {"num_hidden_layers": layers, **short}


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    return (text if name == "RegraftError" else f"{name}: {text}")[:160]
