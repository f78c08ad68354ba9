"""One question to every model type, each answered in a process of its own kind."""

from __future__ import annotations

import os
import queue
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from logging import ERROR
from logging import disable as silence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any

from regraft.benchmarks.small_models import one_line

WORKERS, SECONDS = 2, 180
One = Callable[[str], dict[str, Any]]
Failed = Callable[[str, bool], dict[str, Any]]


def _end_with_parent() -> None:
    wait([parent_process().sentinel])  # type: ignore[union-attr]
    os._exit(1)


def _serve(connection: Any, one: One) -> None:
    import torch
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    silence(ERROR)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection.send("ready")
    while (name := connection.recv()) is not None:
        connection.send(one(name))


class _Worker:
    """A process that answers one type at a time and is replaced when it dies or hangs."""

    def __init__(self, one: One, failed: Failed) -> None:
        self.one, self.failed = one, failed
        self.process: Any = None

    def ask(self, name: str) -> dict[str, Any]:
        if self.process is None:
            context = get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs, self.one), daemon=True)
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
        return self.failed(reason, True)

    def stop(self) -> None:
        """Let an idle process end; kill a busy one."""
        if self.process is not None:
            with suppress(OSError):
                self.connection.send(None)
                self.process.join(5)
            self.process.kill()
            self.process.join()
            self.process = None


def survey(types: list[str], one: One, failed: Failed, label: str) -> dict[str, dict[str, Any]]:
    """What one(type) answers for each type, in processes that may die or hang; one is a function of
    a module. failed(reason, whether it ran) stands for an answer that did not come."""
    from rich.console import Console
    from rich.progress import Progress

    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in types:
        waiting.put(name)
    found: dict[str, dict[str, Any]] = {}
    with Progress(console=Console(file=sys.stderr)) as progress:
        task = progress.add_task(label, total=len(types))

        def work() -> None:
            worker = _Worker(one, failed)
            while True:
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    break
                try:
                    found[name] = worker.ask(name)
                except Exception as error:
                    found[name] = failed(one_line(error), False)
                    worker.stop()
                progress.update(task, advance=1, description=f"{label} {os.path.basename(name)}")
            worker.stop()

        threads = [threading.Thread(target=work) for _ in range(WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found
