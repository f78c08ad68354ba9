"""How many causal language models of transformers compile and compute the same logits."""

from __future__ import annotations

import inspect
import math
import os
import queue
import sys
import threading
import warnings
from contextlib import contextmanager, suppress
from logging import ERROR
from logging import disable as silence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from tempfile import TemporaryDirectory
from typing import Any

from regraft.benchmarks.harness import Check, Result, environment
from regraft.benchmarks.small_models import one_line, small_model

QUICK = ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "phi3", "mistral", "olmo2", "gptj",
         "smollm3", "bert", "mixtral")  # fmt: skip
WORKERS, SECONDS = 2, 180
TOLERANCE = 1e-5


def run(quick: bool, names: list[str] | None = None) -> Result:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    types = list(names or (QUICK if quick else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    found = _survey(types)
    found = {name: found[name] for name in types}
    running = sum(item["runs"] for item in found.values())
    holding = sum(holds(item) for item in found.values())
    counts = {
        "types": len(types),
        "a small configuration runs": running,
        "captured": sum(item["captured"] for item in found.values()),
        "raised": sum(item["raised"] for item in found.values()),
        "with rotary embedding": sum(item["rope"] for item in found.values()),
        "hold": holding,
    }
    return Result(
        f"regraft bench capture{' --quick' if quick else ''}",
        environment(),
        [{"stage": stage, "count": count} for stage, count in counts.items()],
        [
            Check.at_least(
                f"share that holds of the {running} types (of {len(types)}) that run small",
                holding / max(1, running),
                0.9,
            )
        ],
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
        with torch.no_grad(), _fresh():
            model = small_model(model_type)
            outcome["runs"] = True
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
        elif not outcome["raised"]:
            outcome["reason"] = _first_skipped(compiled.report)
    except Exception as error:
        outcome["reason"] = one_line(error)
    return outcome


@contextmanager
def _fresh():
    """No program of an earlier run, and no C++ compiler: every operator runs on its own."""
    names = ("REGRAFT_CACHE", "REGRAFT_INDUCTOR")
    before = {name: os.environ[name] for name in names if name in os.environ}
    with TemporaryDirectory(prefix="regraft-") as folder:
        os.environ.update(REGRAFT_CACHE=folder, REGRAFT_INDUCTOR="0")
        try:
            yield
        finally:
            for name in names:
                os.environ.pop(name)
            os.environ.update(before)


def _outcome(reason: str = "", runs: bool = False) -> dict[str, Any]:
    empty = {"runs": runs, "captured": False, "raised": False, "rope": False}
    return {**empty, "max_abs_error": None, "reason": reason[:160]}


def _first_skipped(report: Any) -> str:
    skipped = [entry for row in report.rows for entry in row.skipped if row.name[:5] == "Raise"]
    return next(
        (f"{where}: {why}" for where, why in skipped if "rotation" not in where),
        "some attention was not raised",
    )


def holds(item: dict[str, Any]) -> bool:
    """Captured with every attention raised, and the logits within the tolerance."""
    error = item["max_abs_error"]
    return item["raised"] and error is not None and error <= TOLERANCE


def _compare(model: Any, compiled: Any) -> float:
    """Largest difference of logits over prefill, decode and a step after cropping the cache."""
    import torch

    limit = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(3, limit, (2, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    accepted = inspect.signature(model.forward).parameters

    def eager(start: int, stop: int, **extra: Any) -> Any:
        if "position_ids" in accepted:
            extra["position_ids"] = positions[:, start:stop]
        return model(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], **extra)

    def whole(start: int, stop: int) -> Any:
        return eager(0, stop, use_cache=False).logits[:, start:]

    carried = "past_key_values" in accepted and "past_key_values" in eager(0, 1, use_cache=True)
    scale, worst, past, cache = 0.0, 0.0, None, compiled.new_cache()

    def note(expected: Any, got: Any, seen: Any) -> None:
        nonlocal scale, worst
        expected, got = expected[seen.bool()], got[seen.bool()]
        scale = max(scale, expected.abs().max().item())
        difference = (expected - got).abs().max().item()
        worst = difference if not difference <= worst else worst

    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9)):
        if carried:
            output = eager(start, stop, past_key_values=past, use_cache=True)
            past, expected = output.past_key_values, output.logits
        else:
            expected = whole(start, stop)
        got = compiled(ids[:, start:stop], mask[:, :stop], past_key_values=cache)
        note(expected, got.logits, mask[:, start:stop])
    cache.crop(-2)
    ids[:, 7] = ids[:, 9]
    got = compiled(ids[:, 7:8], mask[:, :8], past_key_values=cache)
    note(whole(7, 8), got.logits, mask[:, 7:8])
    return worst / scale


def _end_with_parent() -> None:
    wait([parent_process().sentinel])  # type: ignore[union-attr]
    os._exit(1)


def _serve(connection: Any) -> None:
    import torch
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    silence(ERROR)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
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
            self.process.kill()
        except (EOFError, OSError):
            self.process.join(5)
            reason = f"the process died with exit code {self.process.exitcode}"
        self.stop()
        return _outcome(reason, runs=True)

    def stop(self) -> None:
        """Let an idle process end; kill a busy one."""
        if self.process is not None:
            with suppress(OSError):
                self.connection.send(None)
                self.process.join(5)
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
                    found[name] = _outcome(one_line(error))
                    worker.stop()
                progress.update(task, advance=1, description=f"capture {name}")
            worker.stop()

        threads = [threading.Thread(target=work) for _ in range(WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found
