"""regraft.compile: one call from a model to a compiled one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from regraft.passes import DEFAULT, STATELESS, Context, Pass, pass_named, run
from regraft.program import Program, RegraftError, Report
from regraft.runtime.causal_lm import Compiled
from regraft.runtime.module import CompiledModule


def compile(
    model: Any,
    passes: Sequence[Pass] = (),
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    calibration: Sequence[Any] | None = None,
    target: str = "cpu",
    recipe: str | Path | None = None,
    dump_dir: str | Path | None = None,
) -> Any:
    """Capture a model, run the passes, return it compiled.

    model: a transformers model with a causal language head (the result generates), with another
    head or none, or a torch module or exported program. A torch module needs example_inputs, a
    tuple of positional or a dict of keyword inputs, and dynamic_shapes as torch.export takes it.
    passes run after the default ones, in the order given; each must match. recipe names a YAML
    file that lists passes. dump_dir gets the printed graph after each pass. The weights are the
    model's own tensors, fused projections excepted.
    """
    _check_target(model, target)
    asked = [*(read_recipe(recipe) if recipe is not None else ()), *passes]
    for item in asked:
        if not isinstance(item, Pass):
            raise RegraftError(f"{item!r} is not a pass; `regraft passes` lists them")

    def transform(*parts: tuple[str, Program, Sequence[Pass]]) -> Report:
        return _transform(parts, asked, Context(calibration or ()), dump_dir)

    return _compiled(model, example_inputs, dynamic_shapes, transform)


def _compiled(model: Any, example_inputs: Any, dynamic_shapes: Any, transform: Any) -> Any:
    from transformers import PreTrainedModel

    if isinstance(model, torch.export.ExportedProgram):
        from regraft.frontends.module import from_exported

        program = from_exported(model, dynamic_shapes)
    elif isinstance(model, PreTrainedModel) and not model.can_generate():
        from regraft.frontends.encoder import capture_encoder
        from regraft.runtime.encoder import CompiledEncoder

        program = capture_encoder(model, example_inputs, dynamic_shapes)
        return CompiledEncoder(program, transform(("", program, STATELESS)), model)
    elif isinstance(model, PreTrainedModel):
        if example_inputs is not None or dynamic_shapes is not None:
            raise RegraftError("example_inputs and dynamic_shapes: a language model needs none")
        return _compiled_generator(model, transform)
    elif isinstance(model, torch.nn.Module):
        from regraft.frontends.module import capture_module

        if example_inputs is None:
            raise RegraftError(
                f"cannot compile a {type(model).__name__} without example_inputs: give a tuple of "
                "positional inputs or a dict of keyword inputs"
            )
        program = capture_module(model, example_inputs, dynamic_shapes)
    else:
        raise RegraftError(
            f"cannot compile a {type(model).__name__}: give a transformers model, a torch module "
            "or an exported program"
        )
    return CompiledModule(program, transform(("", program, STATELESS)))


def _compiled_generator(model: Any, transform: Any) -> Any:
    """A causal language model or an encoder-decoder, with the model's own ``generate``."""
    if not model.config.is_encoder_decoder:
        from regraft.frontends.huggingface import capture

        program = capture(model)
        kind = type(type(model).__name__, (Compiled,), {})
        return kind(program, transform(("", program, DEFAULT)), model)
    from regraft.frontends.seq2seq import capture_seq2seq
    from regraft.runtime.seq2seq import CompiledSeq2Seq, generation_class

    encoder, cross, step = capture_seq2seq(model)
    report = transform(
        ("encoder", encoder, STATELESS), ("cross", cross, STATELESS), ("decoder", step, DEFAULT)
    )
    kind = type(type(model).__name__, (CompiledSeq2Seq, generation_class(model)), {})
    return kind(encoder, cross, step, report, model)


def _transform(
    parts: Sequence[tuple[str, Program, Sequence[Pass]]],
    asked: Sequence[Pass],
    context: Context,
    dump_dir: str | Path | None,
) -> Report:
    """Run the passes over each part; an asked-for pass must match in one of them."""
    report = Report()
    matches = [0] * len(asked)
    for name, program, default in parts:
        folder = Path(dump_dir) / name if dump_dir is not None else None
        required = asked if len(parts) == 1 else ()
        done = run(program, [*default, *asked], context, required=required, dump_dir=folder).rows
        for index, row in enumerate(done[len(default) :]):
            matches[index] += row.matches
        report.rows += [replace(r, name=f"{r.name} ({name})" if name else r.name) for r in done]
    for item, found in zip(asked, matches, strict=True):
        if not found:
            name = type(item).__name__
            rows = [row for row in report.rows if row.name.startswith(f"{name} (")]
            reasons = "; ".join(f"{where}: {why}" for row in rows for where, why in row.skipped[:1])
            raise RegraftError(f"{name} matched nothing. {reasons or 'No candidate in the graph.'}")
    return report


def _check_target(model: Any, target: str) -> None:
    if target not in ("cpu", "cuda"):
        raise RegraftError(f"unknown target {target!r}: 'cpu' or 'cuda'")
    weights = model.parameters() if hasattr(model, "parameters") else ()
    device = next((weight.device for weight in weights), torch.device(target))
    if device.type != target:
        raise RegraftError(f"the model is on {device}, the target is {target}: move the model")


def read_recipe(path: str | Path) -> list[Pass]:
    """Passes of a YAML file: {version: 1, passes: [{KVQuant: {bits: 4}}, ...]}."""
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RegraftError(f"recipe {path} cannot be read: {error}") from error
    if not isinstance(recipe, dict) or recipe.get("version") != 1:
        raise RegraftError(f"recipe {path} needs 'version: 1' and a list 'passes'")
    if extra := set(recipe) - {"version", "passes"}:
        raise RegraftError(f"recipe {path}: unknown key {sorted(extra)[0]!r}")
    found = []
    for item in recipe.get("passes") or []:
        entry = {item: {}} if isinstance(item, str) else item
        if not isinstance(entry, dict) or len(entry) != 1:
            raise RegraftError(f"recipe {path}: {item!r} is not a pass with its settings")
        ((name, settings),) = entry.items()
        found.append(pass_named(name, settings))
    return found


def write_recipe(passes: Sequence[Pass], path: str | Path) -> None:
    """The YAML that read_recipe reads back."""
    entries = [{type(item).__name__: item.settings()} for item in passes]
    Path(path).write_text(yaml.safe_dump({"version": 1, "passes": entries}, sort_keys=False))
