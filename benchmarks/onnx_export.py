"""SmolLM2 exported to ONNX: time, memory and size; greedy text; speed under onnxruntime.

The other contender is transformers' own exporter, whose decode graph gets the same past.
"""

from __future__ import annotations

import importlib.util
import os
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from regraft.benchmarks.harness import Check, Result, environment, interleaved, progress, threads

DEPTH, ROUNDS, NEW, THREADS = 1024, 30, 64, 2
DENSE, CODED, THEIRS = "regraft", "regraft 4-bit", "transformers exporter"
PROMPT = "Describe how a compiler turns a program into machine code, step by step."


def run(quick: bool) -> Result:
    with threads(THREADS), tempfile.TemporaryDirectory() as scratch:
        return _run(quick, Path(scratch))


def _run(quick: bool, scratch: Path) -> Result:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import regraft
    from regraft.assets import smollm2

    model: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rows: dict[str, dict[str, Any]] = {}
    equal: dict[str, float] = {}
    contenders: dict[str, Path] = {}
    names = [DENSE, CODED]
    if not quick and importlib.util.find_spec("onnxscript"):
        names.append(THEIRS)
    with progress("onnx-export", len(names)) as stage:
        for name in names:
            stage(name)
            folder = scratch / name.replace(" ", "-")
            if name == THEIRS:
                cost = _cost(partial(_theirs, model, tokenizer, folder))
                contenders[name] = next(folder.rglob("*decode*.onnx"))
            else:
                passes = [regraft.KVQuant(bits=4)] if name == CODED else []
                compiled = regraft.compile(model, passes, target="reference")
                cost = _cost(partial(compiled.export_onnx, folder, tokenizer=tokenizer))
                equal[name] = _equal_tokens(compiled, regraft.load(folder), tokenizer)
                contenders[name] = folder / "model.onnx"
            size = sum(p.stat().st_size for p in folder.rglob("*.onnx*"))
            rows[name] = {
                "model": name, "export s": cost["seconds"], "memory / weights":
                cost["bytes"] / weights, "size / weights": size / weights,
                "equal greedy tokens": equal.get(name),
            }  # fmt: skip
    past, logits = _past(model)
    steps = {name: _step(path, past, logits) for name, path in contenders.items()}
    found = interleaved({name: step for name, (step, _) in steps.items()}, ROUNDS)
    for name, seconds in found.items():
        median = statistics.median(seconds)
        rows[name] |= {
            "test": "tg", "depth": DEPTH, "ms": 1e3 * median, "tokens/s": 1 / median,
            "sd": 1e3 * statistics.pstdev(seconds), "error": steps[name][1],
        }  # fmt: skip
    return Result(
        f"regraft bench onnx-export{' --quick' if quick else ''}",
        environment(),
        list(rows.values()),
        _checks(rows, equal),
        chart="tokens/s",
    )


def _checks(rows: dict[str, dict[str, Any]], equal: dict[str, float]) -> list[Check]:
    checks = []
    for name in (DENSE, CODED):
        row = rows[name]
        checks.append(Check.at_most(f"{name}: export, s", row["export s"], 60))
        checks.append(Check.at_most(f"{name}: memory over weights", row["memory / weights"], 3))
        checks.append(Check.at_most(f"{name}: size over weights", row["size / weights"], 1.02))
        checks.append(Check.at_least(f"{name}: equal greedy tokens", equal[name], NEW))
    if THEIRS in rows:
        gain = rows[THEIRS]["ms"] / rows[DENSE]["ms"]
        checks.append(Check.at_least(f"{DENSE} / {THEIRS}, decode at {DEPTH}", gain, 1.0))
    return checks


def _theirs(model: Any, tokenizer: Any, folder: Path) -> None:
    from transformers.exporters import OnnxConfig, OnnxExporter

    inputs = dict(tokenizer(PROMPT, return_tensors="pt"))
    made = OnnxExporter().export_for_generation(model, inputs, OnnxConfig(dynamic=True))
    made.save_pretrained(folder)


def _cost(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds and the highest resident bytes, over those before, of a call."""
    page = os.sysconf("SC_PAGE_SIZE")
    done, most = threading.Event(), [0]

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    def watch() -> None:
        while not done.wait(0.05):
            most[0] = max(most[0], resident())

    before, start = resident(), time.perf_counter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return {"seconds": time.perf_counter() - start, "bytes": max(most[0] - before, 0)}


def _equal_tokens(compiled: Any, exported: Any, tokenizer: Any) -> int:
    """How many of the first new tokens of greedy decoding are the same."""
    turn = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    given = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    one, other = (
        m.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **given)
        for m in (compiled, exported)
    )
    same = (one == other)[0, inputs["input_ids"].shape[1] :]
    return int(same.int().cumprod(0).sum())


@torch.inference_mode()
def _past(model: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Keys and values of DEPTH tokens, layer by layer, and the next token's logits."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, DEPTH), generator=generator)
    output = model(ids, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    past = [x.clone() for layer in cache.layers for x in (layer.keys, layer.values)]
    logits = model(torch.tensor([[7]]), past_key_values=cache, logits_to_keep=1).logits
    return past, logits[0, -1]


def _step(
    path: Path, past: list[torch.Tensor], logits: torch.Tensor
) -> tuple[Callable[[], Any], float | None]:
    """A step of one token behind the past, and its error; for coded caches a past of no tokens is
    filled by the model itself."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    kinds = {spec.name: spec for spec in session.get_inputs()}
    outputs = [spec.name for spec in session.get_outputs()]
    coded = any(name.endswith("_codes") for name in kinds)
    feeds: dict[str, Any] = {}
    for name, spec in kinds.items():
        if "attention_mask" in name:
            feeds[name] = torch.ones(1, DEPTH + 1, dtype=torch.long)
        elif "position" in name:
            feeds[name] = torch.full((1, 1)[: len(spec.shape)], DEPTH)
        elif "input_ids" in name:
            feeds[name] = torch.tensor([[7]])
    states = [name for name in kinds if name not in feeds]
    if coded:
        from regraft.runtime.onnx_lm import load_onnx

        model = load_onnx(path.parent)
        cache: Any = model.new_cache()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, model.config.vocab_size, (1, DEPTH), generator=generator)
        model(ids, past_key_values=cache, logits_to_keep=1)
        model(ids[:, -1:], past_key_values=cache, logits_to_keep=1)  # codes what left the tail
        cache.crop(-1)
        ready = dict(cache.state.past)
    else:
        ready = {name: value(x.numpy()) for name, x in zip(_in_layers(states), past, strict=True)}
    ready |= {name: value(x.numpy()) for name, x in feeds.items()}

    def step() -> Any:
        return session.run_with_ort_values(outputs, ready)

    made = torch.from_numpy(
        step()[outputs.index(next(n for n in outputs if "logits" in n))].numpy()
    )
    error = (made.flatten()[-len(logits) :] - logits).abs().max() / logits.abs().max()
    return step, float(error)


def _in_layers(names: list[str]) -> list[str]:
    """Names of keys and values by layer, keys first."""

    def order(name: str) -> tuple[int, int]:
        return int(re.findall(r"\d+", name)[-1]), int("value" in name.rsplit(".", 1)[-1])

    return sorted(names, key=order)
