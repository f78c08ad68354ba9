"""regraft.compile: one call from a model to a compiled one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from regraft.passes import DEFAULT, FINAL, Context, Pass, pass_named, run
from regraft.program import RegraftError
from regraft.program.folders import cache_dir
from regraft.runtime.causal_lm import Compiled
from regraft.runtime.program_cache import fetch, fingerprint, store
from regraft.runtime.regions import compile_regions


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
) -> Compiled:
    """Capture a Hugging Face causal language model, run the passes, return it compiled.

    passes run after the default ones, in the order given; each must match. recipe names a YAML
    file that lists passes. dump_dir gets the printed graph after each pass. The weights are the
    model's own tensors, fused projections excepted.
    """
    from transformers import PreTrainedModel

    from regraft.frontends.huggingface import capture

    if not isinstance(model, PreTrainedModel):
        raise RegraftError(
            f"cannot compile a {type(model).__name__}: only transformers causal language models "
            "are supported so far"
        )
    if example_inputs is not None or dynamic_shapes is not None:
        raise RegraftError("example_inputs and dynamic_shapes: a causal language model needs none")
    if target not in ("cpu", "cuda", "reference"):
        raise RegraftError(f"unknown target {target!r}: 'cpu', 'cuda' or 'reference'")
    if target != "reference" and model.device.type != target:
        raise RegraftError(
            f"the model is on {model.device}, the target is {target}: move the model"
        )
    asked = [*(read_recipe(recipe) if recipe is not None else ()), *passes]
    for item in asked:
        if not isinstance(item, Pass):
            raise RegraftError(f"{item!r} is not a pass; `regraft passes` lists them")
    final = () if target == "reference" else FINAL
    steps = [*DEFAULT, *asked, *final]
    key = None if calibration or dump_dir else fingerprint(model, steps)
    entry = cache_dir() / "programs" / f"{key}.safetensors"
    kept = fetch(entry, model) if key else None
    if kept is None:
        program = capture(model)
        context = Context(calibration or ())
        report = run(program, steps, context, required=asked, dump_dir=dump_dir)
        if key and "modules" not in program.metadata:
            store(entry, program, report)
    else:
        program, report = kept
    kind = type(type(model).__name__, (Compiled,), {})
    compiled = kind(program, report, model)
    if target != "reference":
        compile_regions(program, compiled.regions, cache_dir() / "regions")
    return compiled


def load(folder: str | Path) -> Compiled:
    """The compiled model that ``Compiled.save`` wrote; RegraftError where it is damaged."""
    from regraft.runtime.artefact import load

    return load(folder)


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
