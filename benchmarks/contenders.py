"""Ways to run one causal language model, and what each costs a fresh process.

`python -m regraft.benchmarks.contenders NAME FOLDER [ONNX]` prints the seconds of the first and of
a later answer, and the peak of its resident memory, as JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.ctypeslib import as_array
from torch import Tensor

import regraft
from regraft.program import RegraftError
from regraft.runtime.machine import environment

EAGER, COMPILED, DENSE, QUANTIZED = "eager", "torch.compile", "regraft dense", "regraft 4-bit"
ONNX, LLAMA = "onnxruntime", "llama.cpp"
PACKED: dict[str, dict[str, Any] | None] = {
    "regraft packed": None,
    "regraft packed, 4-bit cache": {"bits": 4, "outliers": 0.0},
}
"""The GGUF file's own 4-bit weights, and settings of KVQuant."""
FROM_GGUF = (*PACKED, LLAMA)
CODED: dict[str, dict[str, Any]] = {
    QUANTIZED: {"bits": 4, "outliers": 0.0},
    "regraft 4-bit 1 %": {"bits": 4},
    "regraft 2-bit 1 %": {"bits": 2},
}
"""Settings of KVQuant, without calibration."""
NAMES = (EAGER, COMPILED, DENSE, *CODED, *PACKED, LLAMA, ONNX)
PROMPT, THREADS = 512, 2

KeysValues = Sequence[tuple[Tensor, Tensor]]


@dataclass
class Contender:
    """``call(ids, cache)`` gives the last token's logits [1, 1, vocab]; ``new_cache(room)`` an
    empty cache for that many tokens; ``take(cache, layers)`` fills it with rotated keys and values
    [1, heads, tokens, size], None where it must compute its own."""

    call: Callable[[Tensor, Any], Tensor]
    new_cache: Callable[[int], Any]
    take: Callable[[Any, KeysValues], None] | None = None


def build(name: str, model: Any, onnx: Path | None = None, gguf: Path | None = None) -> Contender:
    """The contender on model, an export of it in onnx, or the file it was made from, as it takes.

    RegraftError with the reason where it cannot run here.
    """
    if name == EAGER:
        from transformers import DynamicCache

        return Contender(_caller(model), lambda room: DynamicCache(config=model.config), _update)
    if name == COMPILED:
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 32
        step = torch.compile(model, dynamic=False)
        return Contender(_caller(step), lambda room: _static_cache(model, room), _update)
    if name == ONNX:
        if onnx is None:
            raise RegraftError("onnxruntime needs the folder of an export")
        return onnx_contender(onnx)
    if name in FROM_GGUF and gguf is None:
        raise RegraftError(f"{name} needs a GGUF file")
    if name == LLAMA:
        return llama_contender(gguf)
    if name in PACKED:
        settings = PACKED[name]
        passes = [] if settings is None else [regraft.KVQuant(**settings)]
        packed = regraft.compile(gguf, passes)
        return Contender(_caller(packed), lambda room: packed.new_cache())
    compiled = regraft.compile(model, [regraft.KVQuant(**CODED[name])] if name in CODED else [])
    return Contender(_caller(compiled), lambda room: compiled.new_cache())


def _caller(model: Any) -> Callable[[Tensor, Any], Tensor]:
    return lambda ids, cache: (
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    )


def _static_cache(model: Any, room: int) -> Any:
    from transformers import StaticCache

    config = model.config
    cache = StaticCache(config=config, max_cache_len=room)
    cache.early_initialization(
        1, config.num_key_value_heads, config.head_dim, model.dtype, model.device
    )
    return cache


def _update(cache: Any, layers: KeysValues) -> None:
    for index, (key, value) in enumerate(layers):
        cache.update(key, value, index)


class OnnxCache:
    """The past of an ONNX session, kept where the session left it."""

    def __init__(self, empty: dict[str, Any]) -> None:
        self.empty, self.past = empty, empty
        self.length = 0

    @property
    def nbytes(self) -> int:
        return sum(value.numpy().nbytes for value in self.past.values())

    def reset(self) -> None:
        self.past, self.length = self.empty, 0


def onnx_contender(folder: Path) -> Contender:
    """The decoder in ``folder/model.onnx``, named as optimum and onnxruntime-genai name it."""
    if not (folder / "model.onnx").is_file():
        raise RegraftError(f"{folder} holds no model.onnx")
    try:
        import numpy
        import onnxruntime
    except ImportError as error:
        raise RegraftError("onnxruntime is not installed") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    value_of = onnxruntime.OrtValue.ortvalue_from_numpy
    names = [item.name for item in session.get_inputs()]
    empty = {
        item.name: value_of(numpy.zeros((1, item.shape[1], 0, item.shape[3]), numpy.float32))
        for item in session.get_inputs()
        if item.name.startswith("past_key_values.")
    }

    def call(ids: Tensor, cache: OnnxCache) -> Tensor:
        rows, binding = ids.shape[1], session.io_binding()
        total = cache.length + rows
        inputs = {
            "input_ids": ids.numpy(),
            "attention_mask": numpy.ones((1, total), numpy.int64),
            "position_ids": numpy.arange(cache.length, total)[None],
        }
        for name, array in inputs.items():
            if name in names:
                binding.bind_cpu_input(name, array)
        for name, value in cache.past.items():
            binding.bind_ortvalue_input(name, value)
        for item in session.get_outputs():
            binding.bind_output(item.name)
        session.run_with_iobinding(binding)
        outputs = dict(
            zip((item.name for item in session.get_outputs()), binding.get_outputs(), strict=True)
        )
        cache.past = {name: outputs[name.replace("past_key_values", "present")] for name in empty}
        cache.length = total
        return torch.from_numpy(outputs["logits"].numpy()[:, -1:])

    def take(cache: OnnxCache, layers: KeysValues) -> None:
        for index, pair in enumerate(layers):
            for kind, x in zip(("key", "value"), pair, strict=True):
                cache.past = {
                    **cache.past,
                    f"past_key_values.{index}.{kind}": value_of(x.contiguous().numpy()),
                }
        cache.length = layers[0][0].shape[2]

    return Contender(call, lambda room: OnnxCache(empty), take)


class LlamaCache:
    """A context of llama.cpp, with its own cache in float16."""

    def __init__(self, library: Any, gguf: Path, room: int) -> None:
        threads = torch.get_num_threads()
        self.library = library
        self.run = library.Llama(
            str(gguf), n_ctx=room, n_batch=PROMPT, n_threads=threads,
            n_threads_batch=threads, verbose=False,
        )  # fmt: skip
        settings = self.run.metadata
        heads, size, layers = (
            int(settings[f"llama.{name}"])
            for name in ("attention.head_count_kv", "rope.dimension_count", "block_count")
        )
        self.token_bytes = 2 * 2 * heads * size * layers

    @property
    def nbytes(self) -> int:
        return self.token_bytes * self.run.n_tokens

    def reset(self) -> None:
        self.run.reset()

    def call(self, ids: Tensor) -> Tensor:
        self.run.eval(ids[0].tolist())
        logits = self.library.llama_get_logits_ith(self.run.ctx, -1)
        return torch.from_numpy(as_array(logits, (1, 1, self.run.n_vocab())))


def llama_contender(gguf: Path | None) -> Contender:
    """llama.cpp on a GGUF file."""
    assert gguf is not None
    try:
        import llama_cpp
    except ImportError as error:
        raise RegraftError("llama-cpp-python is not installed (extra peers)") from error
    return Contender(
        lambda ids, cache: cache.call(ids), lambda room: LlamaCache(llama_cpp, gguf, room)
    )


def generate(contender: Contender, ids: Tensor, cache: Any, count: int) -> Tensor:
    """The next ids [1, 1] after ``count`` greedy steps from ids [1, n]."""
    for _ in range(count):
        ids = contender.call(ids, cache)[:, -1:].argmax(-1)
    return ids


def probe(name: str, folder: Path, onnx: Path | None, gguf: Path | None = None) -> dict[str, float]:
    """In this process: seconds to the end of a first answer (compiling, a prompt, two tokens) and
    of a second one, and the peak of resident memory in MiB."""
    from transformers import AutoModelForCausalLM

    model = None
    if name not in FROM_GGUF:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.arange(PROMPT)[None] % 200 + 3
    with torch.inference_mode():
        start = time.perf_counter()
        contender = build(name, model, onnx, gguf)
        cache = contender.new_cache(PROMPT + 16)
        generate(contender, prompt, cache, 3)
        first = time.perf_counter() - start
        cache.reset()
        start = time.perf_counter()
        generate(contender, prompt, cache, 3)
        return {"first": first, "later": time.perf_counter() - start, "peak MiB": _peak_mib()}


def probe_fresh(
    name: str, folder: Path, onnx: Path | None, caches: Path, gguf: Path | None = None
) -> dict[str, float]:
    """``probe`` in a process of its own, whose compilers keep what they make in ``caches``."""
    command = [sys.executable, "-m", "regraft.benchmarks.contenders", name, str(folder)]
    done = subprocess.run(
        [*command, str(onnx or ""), str(gguf or "")],
        env=environment(**cache_folders(caches)),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RegraftError(f"{name} failed in a fresh process: {last[:200]}")
    return json.loads(done.stdout.splitlines()[-1])


def cache_folders(caches: Path) -> dict[str, str]:
    """The environment that sends regraft's and Inductor's caches there."""
    return {
        "REGRAFT_CACHE": str(caches / "regraft"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }


def _peak_mib() -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) / 1024 for x in lines if x.startswith("VmHWM"))
    except (OSError, StopIteration):
        scale = 2**20 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    given = [Path(item) if item else None for item in sys.argv[2:]]
    try:
        print(json.dumps(probe(sys.argv[1], *given)))  # type: ignore[arg-type]
    except RegraftError as error:
        sys.exit(str(error))
