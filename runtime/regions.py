"""Outlined regions compiled ahead of time by Inductor, in worker processes, once per machine.

A region is compiled for decode: one sequence, one token. Prefill and verification spend their time
in matrix products and run operator by operator. What a region is compiled to depends on its graph,
the versions and the processor alone, which name its file in the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import aoti_load_package
from torch._inductor.cpp_builder import get_cpp_compiler

from regraft.kernels.linear.reference import linear_in_blocks
from regraft.program import Program, RegraftError
from regraft.program.program import spec_of
from regraft.program.serialize import graph_to_json, submodule, tensors_of
from regraft.runtime.machine import environment, machine

log = logging.getLogger("regraft")
WORKERS, SECONDS = 2, 300


class Region(torch.nn.Module):
    """Calls the compiled code where the step decodes one token, else the graph's operators."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.operators = module
        self.file: Path | None = None
        nodes = module.graph.find_nodes(op="placeholder")
        self._activations = [i for i, n in enumerate(nodes) if str(n.target).startswith("x")]
        self._run: Any = None

    @property
    def compiled(self) -> bool:
        """Whether an artefact can take the compiled code along."""
        return self._run is not None and self.file is not None

    def load(self, file: Path) -> None:
        """Take up a compiled file, if it exists."""
        self.file = file
        try:
            if file.is_file():
                self._run = aoti_load_package(str(file)).loader.run
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            log.warning("regraft: %s is damaged, delete it: %s", file, reason)

    def compile_here(self, inputs: list[Tensor]) -> None:
        """Compile in this process, for devices whose packages torch cannot be trusted to load."""
        compiled = torch.compile(self.operators, dynamic=False)
        with torch.no_grad():
            compiled(*inputs)
        self._run = lambda arguments: compiled(*arguments)

    def forward(self, decode: bool, *inputs: Tensor) -> Sequence[Tensor]:
        if not decode or self._run is None:
            return self.operators(*inputs)
        arguments = list(inputs)
        for index in self._activations:
            arguments[index] = arguments[index].contiguous()
        return self._run(arguments)


def is_decode(ids: Tensor) -> bool:
    """Whether input ids [batch, length] are one token of one sequence."""
    return ids.numel() == 1


def region_jobs(program: Program) -> dict[str, dict[str, Any]]:
    """{region: job}: all that compiling it for decode needs, as JSON."""
    ids = spec_of(program.graph.find_nodes(op="placeholder")[0])
    ones = dict.fromkeys(ids[1], 1) if ids else {}
    tensors = tensors_of(program.graph_module)
    device = next((t.device.type for t in tensors.values()), "cpu")
    jobs: dict[str, dict[str, Any]] = {}
    for call in program.graph.find_nodes(op="call_module"):
        inputs: list[dict[str, Any]] = []
        for argument in call.args if call.target not in jobs else ():
            spec = spec_of(argument)
            shape = [n if isinstance(n, int) else ones.get(n, -1) for n in spec[1]] if spec else []
            if spec is None or -1 in shape:
                break
            stride = torch.empty(shape, device="meta").stride()
            if argument.op == "get_attr":
                stride = tensors[argument.target].stride()
            name = str(spec[0]).removeprefix("torch.")
            inputs.append({"shape": shape, "stride": stride, "dtype": name, "device": device})
        if inputs and len(inputs) == len(call.args):
            module = submodule(program.graph_module, call.target)
            try:
                graph = graph_to_json(module)
            except RegraftError:
                continue
            jobs[call.target] = {
                "graph": graph,
                "inputs": inputs,
                "machine": machine() | {"source": _source()},
            }
    return jobs


def sample(item: dict[str, Any]) -> Tensor:
    """Zeros of the shape, stride, dtype and device that a job gives an input."""
    dtype, device = getattr(torch, item["dtype"]), item["device"]
    return torch.empty_strided(item["shape"], item["stride"], dtype=dtype, device=device).zero_()


@cache
def _source() -> str:
    files = [
        Path(__file__).with_name("region_worker.py"),
        Path(linear_in_blocks.__code__.co_filename),
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def compile_regions(
    program: Program,
    regions: dict[str, Region],
    workers: Workers,
    shipped: Path | None = None,
) -> None:
    """Give each region its compiled code: from the folders, else by worker processes.

    One notice, and operators one by one, where there is no compiler or no room;
    REGRAFT_INDUCTOR=0 asks for that.
    """
    if not wanted():
        return
    jobs = region_jobs(program)
    if any(item["device"] != "cpu" for job in jobs.values() for item in job["inputs"]):
        for name, job in jobs.items():
            regions[name].compile_here(list(map(sample, job["inputs"])))
        return
    files, missing = {}, {}
    for name, job in jobs.items():
        key = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:32]
        known = [at / f"{key}.pt2" for at in (shipped, workers.folder) if at]
        files[name] = next(filter(Path.is_file, known), known[-1])
        if not files[name].is_file():
            missing[key] = job
    if missing and (reason := workers.compile(missing)):
        log.warning("regraft: running operator by operator, slower: %s", reason)
    for name, file in files.items():
        regions[name].load(file)


def wanted() -> bool:
    return os.environ.get("REGRAFT_INDUCTOR") != "0"


class Workers:
    """Processes that compile regions into a folder.

    One can be started before there is work: it imports while the model is being captured.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._scratch = tempfile.TemporaryDirectory(prefix="regraft-")
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        self._scratch.cleanup()

    def start(self) -> None:
        """Start one more, where there is a compiler and regions are wanted."""
        if not (wanted() and _has_compiler()):
            return
        process = subprocess.Popen(
            [sys.executable, "-m", "regraft.runtime.region_worker", self._scratch.name,
             str(self.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=environment(
                TORCHINDUCTOR_CACHE_DIR=f"{self._scratch.name}/inductor",
                # the processor says what it has; test programs for it take seconds
                TORCHINDUCTOR_VEC_ISA_OK="1",
            ),
        )  # fmt: skip
        self._processes.append(process)

    def compile(self, jobs: dict[str, dict[str, Any]]) -> str:
        """Compile the jobs; the reason why some are not in the folder, or ''."""
        if not _has_compiler():
            return "no C++ compiler was found; install g++ or name one in CXX"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for key, job in jobs.items():
                Path(self._scratch.name, f"{key}.json").write_text(json.dumps(job))
            while len(self._processes) < min(WORKERS, len(jobs)):
                self.start()
            count = len(self._processes)
            waiting = [
                (process, "\n".join(list(jobs)[i::count]))
                for i, process in enumerate(self._processes)
            ]
            with ThreadPoolExecutor(count) as pool:
                errors = pool.map(lambda pair: pair[0].communicate(pair[1], SECONDS)[1], waiting)
            for (process, _), text in zip(waiting, errors, strict=True):
                if process.returncode:
                    last = (text.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
                    return f"a region could not be compiled: {last[:200]}"
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"regions could not be compiled: {error}"
        return ""


def _has_compiler() -> bool:
    try:
        get_cpp_compiler()
    except Exception:
        return False
    return True
