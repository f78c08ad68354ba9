"""How many causal language models of transformers compile and compute the same logits."""

from __future__ import annotations

import inspect
import math
import queue
import sys
import threading
import warnings
from itertools import product
from logging import ERROR
from logging import disable as silence
from multiprocessing import get_context
from typing import Any

from regraft.benchmarks.harness import Check, Result, environment

QUICK = ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "phi3", "mistral", "olmo2", "gptj",
         "smollm3", "bert", "mixtral")  # fmt: skip
WORKERS, SECONDS, LARGEST = 2, 60, 60_000_000
TOLERANCE = 1e-5

_SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, head_dim=16, vocab_size=256, max_position_embeddings=512,
              sliding_window=5, attention_chunk_size=5,
              pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
_GPT2 = dict(n_embd=64, n_layer=2, n_head=4, n_positions=512, n_inner=128, n_ctx=512,
             rotary_dim=8, vocab_size=256, pad_token_id=0)  # fmt: skip
_BART = dict(d_model=64, decoder_layers=2, encoder_layers=2, decoder_attention_heads=4,
             encoder_attention_heads=4, decoder_ffn_dim=128, encoder_ffn_dim=128,
             ffn_dim=128, ffn_hidden_size=128, word_embed_proj_dim=64,
             embedding_size=64)  # fmt: skip
_EXPERTS = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
                n_shared_experts=1,
                moe_intermediate_size=32, shared_expert_intermediate_size=32, n_group=1,
                topk_group=1, moe_num_experts=4, moe_k=2, moe_topk=2)  # fmt: skip
_LATENT = dict(q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
               v_head_dim=16)  # fmt: skip
_ALL = {**_SMALL, **_GPT2, **_BART, **_EXPERTS, **_LATENT}
_SETS: tuple[dict[str, Any], ...] = (
    _ALL,
    {**_ALL, "num_key_value_heads": 4},
    {k: v for k, v in _ALL.items() if k != "head_dim"},
    {k: v for k, v in _ALL.items() if k not in _EXPERTS},
    {**_SMALL, **_GPT2},
    _SMALL,
    {k: v for k, v in _SMALL.items() if k != "pad_token_id"},
)

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# what a type needs beyond the sizes above: layers of each kind, widths that must agree
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1], mamba_n_heads=8, mamba_d_state=16),
    "blt": dict(encoder_hash_byte_group_vocab=64, patching_mode="space"),
    "blt_local_encoder": dict(hidden_size_global=64),
    "blt_local_decoder": dict(hidden_size_global=64),
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": _ROPE, "full_attention": _ROPE},
    ),
    "dbrx": dict(attn_config={"kv_n_heads": 2, "rope_theta": 10000.0}),
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
        layer_types=["linear_attention", "full_attention"], mamba_n_heads=8, mamba_d_state=16,
    ),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "longcat_flash": dict(head_dim=8, num_hidden_layers=4),
    "mamba2": dict(num_heads=8),
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=16,
        indexer_compress_ratio=4,
    ),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "reformer": dict(
        attn_layers=["local", "lsh"], axial_pos_shape=[16, 32], axial_pos_embds_dim=[32, 32],
    ),
    "xlstm": dict(num_heads=4, mode="inference"),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(
        num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2,
    ),
}  # fmt: skip


def run(quick: bool, names: list[str] | None = None) -> Result:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    types = list(names or (QUICK if quick else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    found = _survey(types)
    found = {name: found[name] for name in types}
    holding = sum(_holds(item) for item in found.values())
    counts = {
        "types": len(types),
        "captured": sum(item["captured"] for item in found.values()),
        "raised": sum(item["raised"] for item in found.values()),
        "with rotary embedding": sum(item["rope"] for item in found.values()),
        "hold": holding,
    }
    return Result(
        f"regraft bench capture{' --quick' if quick else ''}",
        environment(),
        [{"stage": stage, "count": count} for stage, count in counts.items()],
        [Check.at_least("share of types that hold", holding / max(1, len(types)), 0.9)],
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
        with torch.no_grad():
            model = _small_model(model_type)
            compiled = regraft.compile(model)
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
    except Exception as error:
        outcome["reason"] = _one_line(error)
    return outcome


def _outcome(reason: str = "") -> dict[str, Any]:
    empty = {"captured": False, "raised": False, "rope": False, "max_abs_error": None}
    return {**empty, "reason": reason[:160]}


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    return (text if name == "RegraftError" else f"{name}: {text}")[:160]


def _holds(item: dict[str, Any]) -> bool:
    return item["max_abs_error"] is not None and item["max_abs_error"] <= TOLERANCE


def _small_model(model_type: str) -> Any:
    """The first keyword set whose model can be built and run."""
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
            model(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=True)
            return model
        except Exception as error:
            reason = reason or _one_line(error)
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
    kinds = {
        key: list(dict.fromkeys(value))
        for key, value in known.items()
        if isinstance(value, list) and len(value) == count and key not in wanted
        and all(isinstance(item, (str, int, float)) for item in value)
    }
    if not kinds:
        return {}
    layers = max(2, *map(len, kinds.values()))
    lists = {key: [kind[i % len(kind)] for i in range(layers)] for key, kind in kinds.items()}
    return {"num_hidden_layers": layers, **lists}


def _compare(model: Any, compiled: Any) -> float:
    """Largest difference of logits over prefill, decode and a step after cropping the cache."""
    import torch

    limit = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(3, limit, (2, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    placed = "position_ids" in inspect.signature(model.forward).parameters

    def eager(start: int, stop: int, past: Any = None, cached: bool = True) -> Any:
        extra = {"position_ids": positions[:, start:stop]} if placed else {}
        return model(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop],
                     past_key_values=past, use_cache=cached, **extra)  # fmt: skip

    scale, worst, past, cache = 0.0, 0.0, None, compiled.new_cache()

    def note(expected: Any, got: Any, seen: Any) -> None:
        nonlocal scale, worst
        expected, got = expected[seen.bool()], got[seen.bool()]
        scale = max(scale, expected.abs().max().item())
        difference = (expected - got).abs().max().item()
        worst = difference if not difference <= worst else worst

    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9)):
        expected = eager(start, stop, past)
        past = expected.past_key_values
        got = compiled(ids[:, start:stop], mask[:, :stop], past_key_values=cache)
        note(expected.logits, got.logits, mask[:, start:stop])
    cache.crop(-2)
    ids[:, 7] = ids[:, 9]
    got = compiled(ids[:, 7:8], mask[:, :8], past_key_values=cache)
    note(eager(0, 8, cached=False).logits[:, -1:], got.logits, mask[:, 7:8])
    return worst / scale


def _serve(connection: Any) -> None:
    import torch
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    silence(ERROR)
    torch.set_num_threads(1)
    connection.send("ready")
    while (name := connection.recv()) is not None:
        connection.send(capture_one(name))


class _Worker:
    """A process that answers one type at a time and is replaced when it dies or hangs."""

    def __init__(self) -> None:
        self.process: Any = None

    def ask(self, name: str) -> dict[str, Any]:
        if self.process is None:
            context = get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
            self.connection.recv()
        try:
            self.connection.send(name)
            if self.connection.poll(SECONDS):
                return self.connection.recv()
            reason = f"took more than {SECONDS} s"
        except (EOFError, OSError):
            self.process.join(5)
            reason = f"the process died with exit code {self.process.exitcode}"
        self.stop()
        return _outcome(reason)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def _survey(types: list[str]) -> dict[str, dict[str, Any]]:
    from rich.console import Console
    from rich.progress import Progress

    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in types:
        waiting.put(name)
    found: dict[str, dict[str, Any]] = {}
    with Progress(console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("capture", total=len(types))

        def work() -> None:
            worker = _Worker()
            while True:
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    break
                try:
                    found[name] = worker.ask(name)
                except Exception as error:
                    found[name] = _outcome(_one_line(error))
                    worker.stop()
                progress.update(task, advance=1, description=f"capture {name}")
            worker.stop()

        threads = [threading.Thread(target=work) for _ in range(WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found
