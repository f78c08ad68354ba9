"""Outlined regions compiled ahead of time by Inductor, in worker processes, once per machine.

A region is compiled for decode (batch 1, one token) and for every other shape. What it is
compiled to depends on its graph, the versions and the processor alone, which name its file in
the cache folder. Where that is impossible the region runs operator by operator.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import aoti_load_package
from torch._inductor.cpp_builder import get_cpp_compiler

from regraft.kernels.linear.reference import linear_in_blocks
from regraft.program import Program
from regraft.program.program import spec_of
from regraft.program.serialize import graph_to_json, tensors_of

log = logging.getLogger("regraft")
WORKERS, SECONDS = 2, 300
DECODE = {"batch_size": 1, "sequence_length": 1}


class Region(torch.nn.Module):
    """Calls the compiled code for the shape of its inputs, else the graph's own operators."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.operators = module
        self.files: dict[str, Path] = {}
        nodes = module.graph.find_nodes(op="placeholder")
        self._activations = [i for i, n in enumerate(nodes) if str(n.target).startswith("x")]
        self._compiled: dict[str, Any] = {}

    def load(self) -> None:
        """Take up the files that exist."""
        for variant, path in self.files.items():
            if path.is_file():
                self._compiled[variant] = aoti_load_package(str(path)).loader

    def forward(self, variant: str, *inputs: Tensor) -> Sequence[Tensor]:
        loader = self._compiled.get(variant)
        if loader is None:
            return self.operators(*inputs)
        arguments = list(inputs)
        for index in self._activations:
            arguments[index] = arguments[index].contiguous()
        return loader.run(arguments)


def variant_of(ids: Tensor) -> str:
    """Which compiled code serves input ids [batch, length]."""
    return "decode" if ids.numel() == 1 else "general"


def region_jobs(program: Program) -> dict[str, dict[str, dict[str, Any]]]:
    """{region: {variant: job}}: a job says all that compiling needs, as JSON."""
    placeholder = program.graph.find_nodes(op="placeholder")[0]
    names = dict(zip((spec_of(placeholder) or (None, ()))[1], DECODE, strict=False))
    tensors = tensors_of(program.graph_module)
    device = next((t.device.type for t in tensors.values()), "cpu")
    jobs: dict[str, dict[str, dict[str, Any]]] = {}
    for call in program.graph.find_nodes(op="call_module"):
        if call.target in jobs:
            continue
        module = program.graph_module.get_submodule(str(call.target))
        inputs = []
        for argument in call.args:
            dtype, dims = spec_of(argument)
            shape = [n if isinstance(n, int) else names.get(n) for n in dims]
            item = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "device": device}
            if argument.op == "get_attr":
                item["stride"] = list(tensors[argument.target].stride())
            inputs.append(item)
        if any(None in item["shape"] for item in inputs):
            continue
        job = {"graph": graph_to_json(module), "inputs": inputs, "machine": machine()}
        jobs[str(call.target)] = {v: {**job, "variant": v} for v in ("decode", "general")}
    return jobs


def machine() -> dict[str, Any]:
    """What compiled code depends on besides its graph."""
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "source": _source(),
    }


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:16]


@cache
def _source() -> str:
    files = [
        Path(__file__).with_name("region_worker.py"),
        Path(linear_in_blocks.__code__.co_filename),
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def compile_regions(program: Program, regions: dict[str, Region], folder: Path) -> None:
    """Give each region its compiled variants: from the folder, else by worker processes.

    One notice, and operators one by one, where there is no compiler or no room.
    """
    jobs = {}
    for name, variants in region_jobs(program).items():
        for variant, job in variants.items():
            key = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:32]
            regions[name].files[variant] = folder / f"{key}.pt2"
            jobs[key] = job
    missing = {key: job for key, job in jobs.items() if not (folder / f"{key}.pt2").is_file()}
    if missing and (reason := _compile_missing(missing, folder)):
        log.warning("regraft: running operator by operator, slower: %s", reason)
    for region in regions.values():
        region.load()


def _compile_missing(jobs: dict[str, dict[str, Any]], folder: Path) -> str:
    """Compile the jobs into the folder; the reason why some are not there, or ''."""
    try:
        get_cpp_compiler()
    except Exception:
        return "no C++ compiler was found; install g++ or name one in CXX"
    workers: list[subprocess.Popen] = []
    try:
        with tempfile.TemporaryDirectory(prefix="regraft-") as scratch:
            for job in jobs:
                Path(scratch, f"{job}.json").write_text(json.dumps(jobs[job]))
            for share in filter(None, (list(jobs)[i::WORKERS] for i in range(WORKERS))):
                workers.append(_start(Path(scratch), folder, share))
            for worker in workers:
                errors = worker.communicate(timeout=SECONDS)[1]
                if worker.returncode:
                    last = (errors.strip().splitlines() or [f"exit code {worker.returncode}"])[-1]
                    return f"a region could not be compiled: {last[:200]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"regions could not be compiled: {error}"
    finally:
        for worker in workers:
            worker.kill()
    return ""


def _start(scratch: Path, folder: Path, keys: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "regraft.runtime.region_worker", str(scratch), str(folder), *keys],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, sys.path))),
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        },
    )
