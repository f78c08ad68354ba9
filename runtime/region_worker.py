"""A process of its own that compiles regions: SCRATCH FOLDER, and keys on standard input.

Reads SCRATCH/KEY.json and leaves FOLDER/KEY.pt2, whole or not at all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import aoti_compile_and_package, config

from regraft.kernels import ops  # noqa: F401  registers the regraft:: operators
from regraft.kernels.linear.reference import in_blocks, linear_in_blocks
from regraft.program.folders import written_whole
from regraft.program.serialize import graph_from_json
from regraft.runtime.regions import sample


def main(scratch: str, folder: str) -> None:
    # Precompiled headers pay off from the third region on; most models have one or two.
    with config.patch({"aot_inductor.precompile_headers": False}):
        for key in sys.stdin.read().split():
            job = json.loads(Path(scratch, f"{key}.json").read_text())
            with written_whole(Path(folder, f"{key}.pt2")) as path:
                compile_job(job, path)


def compile_job(job: dict[str, Any], path: Path) -> None:
    torch.set_num_threads(job["machine"]["threads"])
    inputs = tuple(map(sample, job["inputs"]))
    with torch.no_grad():
        exported = torch.export.export(_Region(graph_from_json(job["graph"], {})), inputs)
        aoti_compile_and_package(exported, package_path=str(path))


class _Region(torch.nn.Module):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.run = _InBlocks(module).run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)


class _InBlocks(fx.Interpreter):
    """Runs linear layers as products over blocks of their weights, where that is faster, and packed
    ones from C++."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target == torch.ops.regraft.packed_linear.default:
            target = torch.ops.regraft.packed_direct.default
        if target == torch.ops.aten.linear.default and in_blocks(args[0], args[1]):
            return linear_in_blocks(*args)
        return super().call_function(target, args, kwargs)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}")
