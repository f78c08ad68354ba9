"""A compiled module or encoder as a folder that onnxruntime runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from regraft.frontends.export.builder import Builder
from regraft.frontends.export.check import LIMITS
from regraft.frontends.export.convert import convert
from regraft.frontends.export.files import MODEL, Exported, checked_target, written
from regraft.kernels.linear.packed import unrounded
from regraft.program import Program, RegraftError, Report


def export_module(
    compiled: Any,
    folder: str | Path,
    *,
    opset: int = 21,
    functions: bool = True,
    tokenizer: Any = None,
    force: bool = False,
) -> Exported:
    """See ``CompiledModule.export_onnx``."""
    folder = checked_target(folder, opset, force)
    model = module_to_onnx(compiled.program, compiled.report, opset, functions)
    with written(folder, model) as made:
        for part in (getattr(compiled, "config", None), tokenizer):
            if part is not None:
                part.save_pretrained(made)
        errors = _check(made / MODEL, compiled.program)
    return Exported.of(folder, model, errors, {}, "outputs")


def module_to_onnx(
    program: Program, report: Report, opset: int = 21, functions: bool = True
) -> ir.Model:
    """The program as a model, inputs and outputs by name."""
    from regraft import __version__

    if "whole" in program.metadata:
        raise RegraftError(f"no graph was traced to export: {program.metadata['python']}")
    outputs = tuple(replace(spec, name=_name(spec.name)) for spec in program.outputs)
    builder = Builder(opset, functions)
    model = convert(replace(program, outputs=outputs), builder, __version__)
    rows = [{"pass": row.name, "matches": row.matches} for row in report.rows]
    model.metadata_props.update(regraft_version=__version__, regraft_passes=json.dumps(rows))
    return model


def _name(path: str) -> str:
    """ "output.last_hidden_state" -> "last_hidden_state", "output.1.0" -> "output_1_0"."""
    name = path.removeprefix("output.")
    return path.replace(".", "_") if name[:1].isdigit() else name


def _check(path: Path, program: Program) -> dict[str, float]:
    """The largest difference over the largest output, on the examples and on other sizes."""
    from regraft.runtime.onnx_session import OnnxSession

    if not program.examples:
        raise RegraftError("the program keeps no example inputs to check an export with")
    session = OnnxSession.open(path, exact=True)
    cases = {"examples": list(program.examples)}
    if any(isinstance(size, str) for spec in program.inputs for size in spec.shape):
        cases["other sizes"] = _resized(program)
    errors = {}
    for name, inputs in cases.items():
        with unrounded():
            wanted, found = program(*inputs), session.run([x.cpu() for x in inputs])
        worst = 0.0
        for want, got in zip(wanted, found, strict=True):
            error = _difference(want.cpu(), got)
            worst = error if not error <= worst else worst
            limit = LIMITS.get(want.dtype, 1e-3)
            if not error <= limit:
                raise RegraftError(
                    f"the export differs from the compiled program: {name} by {error:.1e} of the "
                    f"largest output, {limit:.0e} allowed; nothing was written"
                )
        errors[name] = worst
    return errors


def _difference(want: Tensor, got: Tensor) -> float:
    if want.shape != got.shape:
        return float("inf")
    want, got = want.double(), got.double()
    finite = torch.isfinite(want)
    if not want.numel() or not torch.equal(want[~finite].nan_to_num(), got[~finite].nan_to_num()):
        return 0.0 if not want.numel() else float("inf")
    want, got = want[finite], got[finite]
    if not want.numel():
        return 0.0
    error = float((want - got).abs().max() / want.abs().max().clamp(min=1e-6))
    return error if error == error else float("inf")


def _resized(program: Program) -> list[Tensor]:
    """The examples with every dynamic size one more, or one less where it is bounded."""
    ranges = program.metadata.get("ranges", {})
    sizes: dict[str, int] = {}
    inputs = []
    for spec, x in zip(program.inputs, program.examples, strict=True):
        for dim, name in enumerate(spec.shape):
            if not isinstance(name, str):
                continue
            if name not in sizes:
                _, most = ranges.get(name, (0, None))
                now = x.shape[dim]
                sizes[name] = now + 1 if most is None or now < most else now
            x = x.index_select(dim, torch.arange(sizes[name], device=x.device) % x.shape[dim])
        inputs.append(x)
    return inputs
