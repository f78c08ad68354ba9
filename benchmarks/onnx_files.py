"""Real ONNX files out of packages, imported: equal to onnxruntime at several sizes, and how fast.

A rounding of the last bit that dynamic quantisation turns into another code changes all that
follows, in onnxruntime as here: its own optimised and plain runs of such a file differ. These
files are compared twice: as they are, and cut at their quantisers, where both runs go on from
the same codes and every value that a quantiser takes is compared too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from regraft.assets import ONNX_FILES, onnx_file
from regraft.benchmarks.harness import Check, Result, environment, interleaved, progress, threads

TOLERANCE = 1e-4
QUICK = ("akiki-vad", "silero-vad-16k", "hibari-oov-gb")
Feeds = dict[str, np.ndarray]


def run(quick: bool) -> Result:
    names = QUICK if quick else tuple(ONNX_FILES)
    with threads(1), progress("onnx-files", len(names)) as begin:
        rows = []
        for name in names:
            begin(name)
            rows.append(_row(name, 3 if quick else 9))
    compared = [row["error"] if row["cut"] is None else row["cut"] for row in rows]
    return Result(
        f"regraft bench onnx-files{' --quick' if quick else ''}",
        environment() | _versions(),
        rows,
        [
            Check.at_least("files imported", len(rows), len(names)),
            Check.at_most(
                "largest error over the output's scale, quantised files cut",
                max(compared),
                TOLERANCE,
            ),
            Check.at_most("slowest import, seconds", max(row["import s"] for row in rows), 20),
        ],
        chart="import s",
    )


def _row(name: str, rounds: int) -> dict[str, Any]:
    import regraft

    path = onnx_file(name)
    calls = calls_of(name)
    start = time.perf_counter()
    compiled = regraft.compile(path)
    seconds = time.perf_counter() - start
    session = session_of(path.read_bytes())
    worst = max(difference(run_ours(compiled, given), session.run(None, given)) for given in calls)
    cut = own = None
    if "DynamicQuantizeLinear" in operators(path):
        cut = max(cut_difference(path, given) for given in calls)
        plain = session_of(path.read_bytes(), optimised=False)
        own = max(difference(plain.run(None, g), session.run(None, g)) for g in calls)
    last = calls[-1]
    took = interleaved(
        {"ours": lambda: run_ours(compiled, last), "theirs": lambda: session.run(None, last)},
        rounds,
    )
    ours, theirs = (1e3 * median(took[key]) for key in ("ours", "theirs"))
    return {
        "model": name,
        "operators": len(operators(path)),
        "traced": "python" not in compiled.program.metadata,
        "sizes": "; ".join(shown(given) for given in calls),
        "import s": seconds,
        "error": worst,
        "cut": cut,
        "own": own,
        "ours ms": ours,
        "onnxruntime ms": theirs,
        "ratio": theirs / ours,
    }


def calls_of(name: str) -> list[Feeds]:
    """Inputs of several sizes, or of several contents where the file fixes its sizes."""
    rng = np.random.default_rng(0)

    def floats(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    def sound(*shape: int) -> np.ndarray:
        """Tones under noise, within -1 and 1."""
        places = np.arange(shape[-1]) / 16000
        tone = np.sin(2 * np.pi * rng.uniform(80, 800) * places)
        return (0.5 * tone + 0.1 * rng.normal(size=shape)).astype(np.float32)

    def page(*shape: int) -> np.ndarray:
        """White, with a line of dark strokes in every 32 rows, as text has; from -1 to 1."""
        made = np.ones(shape)
        for top in range(6, shape[2] - 20, 32):
            strokes = rng.random((shape[0], 1, 5, shape[3] // 4)) < 0.5
            ink = strokes.repeat(4, 2).repeat(4, 3)[..., 8:-8]
            made[:, :, top : top + 20, 8 : 8 + ink.shape[3]] -= 2.0 * ink
        return (made + 0.02 * rng.normal(size=shape)).astype(np.float32)

    def ids(limit: int, *shape: int) -> np.ndarray:
        return rng.integers(1, limit, shape)

    def vad(batch: int, samples: int, rate: int | None) -> Feeds:
        given = {"input": sound(batch, samples), "state": floats(2, batch, 128) / 4}
        return given if rate is None else {**given, "sr": np.array(rate)}

    def tokens(batch: int, length: int) -> Feeds:
        mask = np.ones((batch, length), np.int64)
        mask[0, -(length // 3) :] = 0
        kinds = np.zeros_like(mask)
        words = ids(9000, batch, length)
        return {"input_ids": words, "attention_mask": mask, "token_type_ids": kinds}

    def spoken(length: int, speed: float) -> Feeds:
        return {"ids": ids(170, 1, length), "speed": np.array([speed], np.float32)}

    made: dict[str, Callable[[], list[Feeds]]] = {
        "akiki-vad": lambda: [
            {"audio_with_context": sound(1, 576), "h": floats(1, 1, 128) / 4} for _ in range(3)
        ],
        "hibari": lambda: [spoken(n, s) for n, s in ((7, 1.0), (19, 0.8), (43, 1.3))],
        "hibari-oov": lambda: [{"chars": ids(60, 1, n)} for n in (3, 8, 17)],
        "hibari-oov-gb": lambda: [{"chars": ids(60, 1, n)} for n in (3, 8, 17)],
        "magika": lambda: [
            {"bytes": rng.integers(0, 256, (n, 2048)).astype(np.int32)} for n in (1, 3, 8)
        ],
        "ppocr-cls": lambda: [
            {"x": page(*n)} for n in ((1, 3, 48, 192), (4, 3, 48, 192), (2, 3, 64, 96))
        ],
        "ppocr-det": lambda: [
            {"x": page(*n)} for n in ((1, 3, 64, 96), (2, 3, 160, 128), (1, 3, 320, 320))
        ],
        "ppocr-rec": lambda: [
            {"x": page(*n)} for n in ((1, 3, 48, 96), (3, 3, 48, 160), (2, 3, 48, 320))
        ],
        "rampart": lambda: [tokens(*n) for n in ((1, 5), (3, 17), (2, 64))],
        "silero-vad": lambda: [vad(1, 576, 16000), vad(3, 576, 16000), vad(2, 288, 8000)],
        "silero-vad-16k": lambda: [vad(n, 576, 16000) for n in (1, 2, 5)],
        "silero-vad-sequence": lambda: [
            {"input": sound(n, 576), "h": floats(1, 1, 128) / 4, "c": floats(1, 1, 128)}
            for n in (1, 4, 9)
        ],
        "silero-vad-half": lambda: [vad(n, 576, None) for n in (1, 2, 5)],
        "silero-vad-ifless": lambda: [vad(1, 576, 16000), vad(3, 576, 16000), vad(2, 288, 8000)],
        "silero-vad-openvino": lambda: [vad(1, 576, None) for _ in range(3)],
    }
    return made[name]()


def run_ours(compiled: Any, given: Feeds) -> list[np.ndarray]:
    import torch

    found = compiled(**{name: torch.from_numpy(value) for name, value in given.items()})
    return [value.numpy() for value in (found if isinstance(found, tuple) else (found,))]


def difference(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """The largest over the outputs of |found - wanted| over the largest |wanted|; integers must
    be equal, shapes too: else infinite."""
    worst = 0.0
    for ours, theirs in zip(found, wanted, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return float("inf")
        if not np.issubdtype(theirs.dtype, np.floating):
            worst = max(worst, 0.0 if np.array_equal(ours, theirs) else float("inf"))
        elif theirs.size:
            off = np.abs(ours.astype(np.float64) - theirs).max()
            if not np.isfinite(off):
                return float("inf")
            worst = max(worst, float(off / max(np.abs(theirs).max(), 1e-30)))
    return worst


def cut_difference(path: Path, given: Feeds) -> float:
    """The difference of a file cut at its dynamic quantisers, both runs fed onnxruntime's codes;
    infinite where our quantiser makes other codes of onnxruntime's numbers."""
    import onnx
    import torch

    from regraft.frontends.onnx.module import OnnxModule
    from regraft.frontends.onnx.operators.quantisation import dynamic_quantize_linear

    model = onnx.load(path)
    quantisers = [n for n in model.graph.node if n.op_type == "DynamicQuantizeLinear"]
    outputs = [info.name for info in model.graph.output]
    taken = list(dict.fromkeys(node.input[0] for node in quantisers))
    codes = [name for node in quantisers for name in node.output]
    for name in (*taken, *codes):
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = session_of(model.SerializeToString(), optimised=False)
    names = [*outputs, *taken, *codes]
    held = dict(zip(names, session.run(names, given), strict=True))
    for node in quantisers:
        made = dynamic_quantize_linear(torch.from_numpy(held[node.input[0]]))
        if not all(np.array_equal(m, held[n]) for m, n in zip(made, node.output, strict=True)):
            return float("inf")
    for node in quantisers:
        model.graph.node.remove(node)
    del model.graph.output[-len(codes) :]
    kinds = (onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8)
    for node in quantisers:
        for name, kind in zip(node.output, kinds, strict=True):
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
    fed = {**given, **{name: held[name] for name in codes}}
    return difference(run_ours(OnnxModule(model), fed), [held[n] for n in (*outputs, *taken)])


def operators(path: Path) -> list[str]:
    """The operators of a file, those of its branches too, constants excepted."""
    import onnx

    from regraft.frontends.onnx.check import all_nodes

    nodes = all_nodes(onnx.load(path).graph.node)
    return [node.op_type for node in nodes if node.op_type != "Constant"]


def session_of(data: bytes, optimised: bool = True) -> Any:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    level = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def shown(given: Feeds) -> str:
    """The sizes of the inputs that have some."""
    return " ".join("x".join(map(str, v.shape)) for v in given.values() if v.ndim)


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime

    return {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
