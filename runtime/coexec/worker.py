"""A process that compiles stretches, so that the program beside it keeps its interpreter."""

from __future__ import annotations

import io
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe
from typing import Any

import torch

from regraft.runtime.coexec.build import extension
from regraft.runtime.coexec.compiled import Job, Whole, compile_function
from regraft.runtime.coexec.kept import name, set_all, settings, store
from regraft.runtime.coexec.pieces import Pieces
from regraft.runtime.coexec.stretch import Unfit, operator
from regraft.runtime.machine import environment

log = logging.getLogger("regraft")
IDLE, NICER = 30.0, 5  # seconds without work after which it ends


class Worker:
    """Started at the first job, and again where it has ended. over: at the program's end."""

    over = False

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._pipe: Connection | None = None
        self._lock = threading.Lock()

    def compile(self, job: Job) -> bool:
        """Whether what the job asks for is kept now. Raises Unfit at the program's end."""
        buffer = io.BytesIO()
        try:
            _Pickler(buffer).dump((name(job.computed), dict(os.environ), settings(), job))
            reason = self._ask(buffer.getvalue())
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if self.over:
            raise Unfit("the program ends")
        if reason:
            log.debug("a stretch is not kept by a process of its own: %s", reason)
        return not reason

    def _ask(self, request: bytes) -> str:
        for _ in range(2):  # one that waited too long ends, maybe as it is asked
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._pipe is not None
            try:
                self._pipe.send_bytes(request)
                return self._pipe.recv()
            except (EOFError, OSError):
                self.close()
            if self.over:
                break
        raise RuntimeError("the process ended")

    def _start(self) -> None:
        self.close()
        self._pipe, theirs = Pipe()
        with theirs, self._lock:
            if self.over:
                return
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env=environment(),
            )  # fmt: skip

    def end(self) -> None:
        """From whichever thread; for good once all are over."""
        with self._lock:
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._pipe = self._process = None


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch._ops.OpOverload):
            return operator, (value._schema.name, value._schema.overload_name)
        return NotImplemented


def serve(pipe: Connection) -> None:
    while pipe.poll(IDLE):
        try:
            pipe.send(_compile(pipe.recv_bytes()))
        except EOFError:
            return


def _compile(request: bytes) -> str:
    """Why nothing was kept; "" where it was."""
    try:
        key, variables, found, job = pickle.loads(request)
        os.environ.clear()
        os.environ.update(variables)
        set_all(found)
        if name(job.computed) != key:
            return "it has other settings"
        made = compile_function(job, keep=True)
        assert isinstance(made, Pieces | Whole)
        return "" if store(key, made) else "the cache cannot be written"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the program, that ends it
    os.nice(NICER)
    extension()  # has operators
    serve(Connection(int(sys.argv[1])))
