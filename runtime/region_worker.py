"""A process of its own that compiles regions: SCRATCH FOLDER KEY...

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
from regraft.kernels.linear.reference import linear_in_blocks, splits
from regraft.program.folders import written_whole
from regraft.program.serialize import graph_from_json
from regraft.runtime.regions import DECODE

SAMPLE = {"batch_size": 3, "sequence_length": 7}


def main(scratch: str, folder: str, *keys: str) -> None:
    # Precompiled headers pay off from the third region on; most models have one or two.
    with config.patch({"aot_inductor.precompile_headers": False}):
        for key in keys:
            job = json.loads(Path(scratch, f"{key}.json").read_text())
            with written_whole(Path(folder, f"{key}.pt2")) as path:
                compile_job(job, path)


def compile_job(job: dict[str, Any], path: Path) -> None:
    torch.set_num_threads(job["machine"]["threads"])
    module = graph_from_json(job["graph"], {})
    decode = job["variant"] == "decode"
    inputs = tuple(_sample(item, DECODE if decode else SAMPLE) for item in job["inputs"])
    dims = None if decode else (tuple(map(_dynamic, job["inputs"])),)
    with torch.no_grad():
        region = _Region(module, blocks=decode)
        exported = torch.export.export(region, inputs, dynamic_shapes=dims)
        aoti_compile_and_package(exported, package_path=str(path))


class _Region(torch.nn.Module):
    def __init__(self, module: fx.GraphModule, blocks: bool) -> None:
        super().__init__()
        self.run = (_InBlocks if blocks else fx.Interpreter)(module).run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)


class _InBlocks(fx.Interpreter):
    """Runs linear layers as products over blocks of their weights."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target == torch.ops.aten.linear.default and splits(args[0], args[1]):
            return linear_in_blocks(*args)
        return super().call_function(target, args, kwargs)


def _sample(item: dict[str, Any], sizes: dict[str, int]) -> Tensor:
    shape = [n if isinstance(n, int) else sizes[n] for n in item["shape"]]
    dtype = getattr(torch, item["dtype"])
    if "stride" in item:
        return torch.empty_strided(shape, item["stride"], dtype=dtype, device=item["device"])
    return torch.zeros(shape, dtype=dtype, device=item["device"])


def _dynamic(item: dict[str, Any]) -> dict[int, Any]:
    limits = {"batch_size": 2**15, "sequence_length": 2**20}
    return {
        dim: torch.export.Dim(name, max=limits[name])
        for dim, name in enumerate(item["shape"])
        if not isinstance(name, int)
    }


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}")
