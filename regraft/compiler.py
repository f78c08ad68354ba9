"""regraft.compile: one call from a model to a compiled one."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import parent_process
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from regraft.fallback import FALLBACKS, Uncaptured, capturing, coexecuted
from regraft.passes import (
    DEFAULT,
    FINAL,
    GGUF,
    STATELESS,
    Context,
    FuseLinear,
    KeepPacked,
    Pass,
    run,
)
from regraft.program import Program, RegraftError, Report
from regraft.program.folders import cache_dir
from regraft.recipe import read_recipe
from regraft.runtime.causal_lm import Compiled
from regraft.runtime.module import CompiledModule
from regraft.runtime.program_cache import fetch, fingerprint, store
from regraft.runtime.regions import Workers, compile_regions
from regraft.runtime.warm import warm_up

TARGETS = ("cpu", "cuda", "onnx", "reference")


@dataclass(frozen=True)
class _Pipeline:
    """What happens to every captured program."""

    asked: Sequence[Pass]
    calibration: Sequence[Any]
    target: str
    dump_dir: str | Path | None
    stage: Callable[..., None]

    def tell(self, what: str) -> None:
        self.stage(f"passes, {what}", advance=0)

    def steps(self, default: Sequence[Pass]) -> list[Pass]:
        return [*default, *self.asked, *(FINAL if self.compiles else ())]

    @property
    def compiles(self) -> bool:
        """Whether regions and kernels are compiled: not for a reference or an export."""
        return self.target not in ("reference", "onnx")

    def key(self, model: Any, settings: Sequence[Any]) -> str | None:
        """What the program is kept under; None where it depends on values of tensors."""
        reads_weights = any(item.reads_weights for item in self.asked)
        if self.calibration or self.dump_dir or reads_weights:
            return None
        return fingerprint(model, settings)

    def run(self, *parts: tuple[str, Program, Sequence[Pass]]) -> Report:
        """Run the passes over each part; an asked-for pass must match in one of them."""
        self.stage("passes")
        report = Report()
        matches = [0] * len(self.asked)
        for name, program, default in parts:
            if not self.compiles:
                program.cache = replace(program.cache, kernels=False)
            folder = Path(self.dump_dir) / name if self.dump_dir is not None else None
            required = self.asked if len(parts) == 1 else ()
            context = Context(self.calibration, self.tell)
            steps = self.steps(default)
            rows = run(program, steps, context, required=required, dump_dir=folder).rows
            for index in range(len(matches)):
                matches[index] += rows[len(default) + index].matches
            report.rows += [replace(r, name=f"{r.name} ({name})" if name else r.name) for r in rows]
        for item, found in zip(self.asked, matches, strict=True):
            if not found:
                name = type(item).__name__
                rows = [row for row in report.rows if row.name.startswith(f"{name} (")]
                why = "; ".join(f"{where}: {why}" for row in rows for where, why in row.skipped[:1])
                raise RegraftError(f"{name} matched nothing. {why or 'No candidate in the graph.'}")
        return report

    def compile_regions(self, program: Program, regions: Any, workers: Workers) -> None:
        if self.compiles:
            self.stage("regions")
            with ThreadPoolExecutor(1) as pool:
                kernels = pool.submit(warm_up, program)
                compile_regions(program, regions, workers)
                kernels.result()


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
    fallback: str = "coexecute",
) -> Any:
    """Capture a model, run the passes, return it compiled.

    model: a transformers model with a language head (the result generates), with another head
    or none, a torch module or exported program, an ONNX model (a path, bytes or ModelProto; a
    folder with model.onnx and config.json is a language model), or the path of a GGUF file, whose
    weights stay packed.
    A torch module needs example_inputs, a tuple of positional or a dict of keyword inputs, and
    dynamic_shapes as torch.export takes it; an ONNX model may have example_inputs.
    passes run after the default ones, in the order given; each must match. recipe names a YAML
    file that lists passes. target "onnx" exports a language model and runs it by onnxruntime,
    "reference" runs it operator by operator. dump_dir gets the printed graph after each pass.
    The weights are the model's own tensors, fused projections excepted.
    fallback: a torch module that cannot be one graph (control flow that depends on data, calls out
    of torch) comes back as itself, its calls and generate under co-execution, with a notice of what
    stopped capture; "error" raises that. Passes, other targets than "cpu" need the graph.
    """
    _check_target(model, target)
    if fallback not in FALLBACKS:
        raise RegraftError(f"unknown fallback {fallback!r}: {', '.join(FALLBACKS)}")
    asked = [*(read_recipe(recipe) if recipe is not None else ()), *passes]
    for item in asked:
        if not isinstance(item, Pass):
            raise RegraftError(f"{item!r} is not a pass; `regraft passes` lists them")
    with _progress(type(model).__name__) as stage:
        pipeline = _Pipeline(
            asked, () if calibration is None else calibration, target, dump_dir, stage
        )
        stage("capture")
        try:
            return _compile(model, example_inputs, dynamic_shapes, pipeline)
        except Uncaptured as error:
            if fallback == "error" or target != "cpu":
                raise
            return coexecuted(model, asked, example_inputs, error)


def _compile(model: Any, example_inputs: Any, dynamic_shapes: Any, pipeline: _Pipeline) -> Any:
    if not _is_gguf(model):
        if _is_onnx(model):
            return _compile_onnx(model, example_inputs, dynamic_shapes, pipeline)
        if not _generates(model):
            return _compile_module(model, example_inputs, dynamic_shapes, pipeline)
    if example_inputs is not None or dynamic_shapes is not None:
        raise RegraftError("example_inputs and dynamic_shapes: a language model needs none")
    if _is_gguf(model):
        compiled = _compile_gguf(Path(model), pipeline)
    elif model.config.is_encoder_decoder:
        return _compile_seq2seq(model, pipeline)
    else:
        compiled = _compile_causal_lm(model, pipeline)
    return _in_onnxruntime(compiled, pipeline.stage) if pipeline.target == "onnx" else compiled


def _in_onnxruntime(compiled: Compiled, stage: Callable[..., None]) -> Compiled:
    """The compiled model exported to a folder that lives as long as what runs it."""
    stage("export")
    scratch = tempfile.TemporaryDirectory(prefix="regraft-")
    compiled.export_onnx(Path(scratch.name))
    loaded = load(scratch.name)
    weakref.finalize(loaded, scratch.cleanup)
    return loaded


@contextmanager
def _progress(name: str) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, gone at the end: capture, passes, regions."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    hidden = not console.is_terminal or parent_process() is not None
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(f"compiling {name}", total=4)

        def stage(what: str, advance: int = 1) -> None:
            bar.update(task, advance=advance, description=f"compiling {name}: {what}")

        yield stage


def _generates(model: Any) -> bool:
    return bool(getattr(model, "can_generate", bool)()) and hasattr(model, "config")


def _is_gguf(model: Any) -> bool:
    return isinstance(model, (str, Path)) and str(model).lower().endswith(".gguf")


def _compile_gguf(path: Path, pipeline: _Pipeline) -> Compiled:
    """The language model of a GGUF file."""
    from regraft.frontends.gguf import give_back, load_gguf
    from regraft.frontends.huggingface import capture

    if not path.is_file():
        raise RegraftError(f"{path} is no file")
    default = [*(step for step in DEFAULT if not isinstance(step, FuseLinear)), *GGUF]
    asked = [step for step in pipeline.asked if not isinstance(step, KeepPacked)]
    pipeline = replace(pipeline, asked=asked)
    with Workers(cache_dir() / "regions") as workers:
        given = load_gguf(path)
        model = given.model

        def make() -> tuple[Program, Report]:
            program = capture(model)
            given.attach(program)
            give_back()
            return program, pipeline.run(("", program, default))

        key = pipeline.key(model, [*pipeline.steps(default), given.digest])
        program, report = _kept_or_made(key, model, make, pipeline, workers, given.packed)
        known = SimpleNamespace(
            config=model.config, generation_config=model.generation_config,
            device=torch.device("cpu"), dtype=model.dtype, name_or_path=str(path),
        )  # fmt: skip
        return _finished(program, report, known, pipeline, workers, type(model).__name__)


def _is_onnx(model: Any) -> bool:
    return isinstance(model, (str, Path, bytes)) or type(model).__name__ == "ModelProto"


def _compile_onnx(
    model: Any, example_inputs: Any, dynamic_shapes: Any, pipeline: _Pipeline
) -> CompiledModule | Compiled:
    from regraft.frontends.onnx.capture import capture_onnx
    from regraft.runtime.onnx_model import CompiledOnnx

    if dynamic_shapes is not None:
        raise RegraftError("dynamic_shapes: an ONNX model names its own dynamic sizes")
    if isinstance(model, (str, Path)) and Path(model).is_dir():
        return _compile_decoder(Path(model), pipeline)
    program = capture_onnx(model, example_inputs)
    if "whole" in program.metadata:
        if pipeline.asked:
            raise RegraftError(
                f"no pass applies to a model called whole: {program.metadata['python']}"
            )
        return CompiledOnnx(program, Report())
    return CompiledOnnx(program, pipeline.run(("", program, STATELESS)))


def _compile_decoder(folder: Path, pipeline: _Pipeline) -> Compiled:
    """The language model of a folder that an exporter wrote."""
    from regraft.frontends.onnx.decoder import capture_decoder
    from regraft.runtime.onnx_lm import MODEL, configurations

    if not (folder / MODEL).is_file():
        raise RegraftError(f"{folder} holds no {MODEL}: load a transformers model first")
    config, generation = configurations(folder)
    with Workers(cache_dir() / "regions") as workers:
        if pipeline.target == "cpu":
            workers.start()
        program = capture_decoder(folder / MODEL, config)
        report = pipeline.run(("", program, DEFAULT))
        known = SimpleNamespace(
            config=config, generation_config=generation, device=torch.device("cpu"),
            dtype=program.outputs[0].dtype, name_or_path=str(folder),
        )  # fmt: skip
        name = (config.architectures or ["CausalLM"])[0]
        return _finished(program, report, known, pipeline, workers, name)


def _compile_causal_lm(model: Any, pipeline: _Pipeline) -> Compiled:
    from regraft.frontends.huggingface import capture

    def make() -> tuple[Program, Report]:
        with capturing():
            program = capture(model)
        return program, pipeline.run(("", program, DEFAULT))

    with Workers(cache_dir() / "regions") as workers:
        key = pipeline.key(model, pipeline.steps(DEFAULT))
        program, report = _kept_or_made(key, model, make, pipeline, workers)
        return _finished(program, report, model, pipeline, workers, type(model).__name__)


def _kept_or_made(
    key: str | None,
    model: Any,
    make: Callable[[], tuple[Program, Report]],
    pipeline: _Pipeline,
    workers: Workers,
    packed: Callable[[list[str]], torch.Tensor] | None = None,
) -> tuple[Program, Report]:
    """The program that an earlier compilation kept under this key, else a new one."""
    entry = cache_dir() / "programs" / f"{key}.safetensors"
    if key and (kept := fetch(entry, model, packed)):
        return kept
    if pipeline.target == "cpu":
        workers.start()
    program, report = make()
    if key:
        store(entry, program, report)
    return program, report


def _finished(
    program: Program, report: Report, known: Any, pipeline: _Pipeline, workers: Workers, name: str
) -> Compiled:
    kind = type(name, (Compiled,), {})
    compiled = kind(program, report, known)
    pipeline.compile_regions(program, compiled.regions, workers)
    return compiled


def _compile_seq2seq(model: Any, pipeline: _Pipeline) -> Any:
    from regraft.frontends.seq2seq import capture_seq2seq
    from regraft.runtime.seq2seq import CompiledSeq2Seq, generation_class

    with capturing():
        encoder, cross, step = capture_seq2seq(model)
    report = pipeline.run(
        ("encoder", encoder, STATELESS), ("cross", cross, STATELESS), ("decoder", step, DEFAULT)
    )
    kind = type(type(model).__name__, (CompiledSeq2Seq, generation_class(model)), {})
    compiled = kind(encoder, cross, step, report, model)
    with Workers(cache_dir() / "regions") as workers:
        pipeline.compile_regions(step, compiled.regions, workers)
    return compiled


def _compile_module(
    model: Any, example_inputs: Any, dynamic_shapes: Any, pipeline: _Pipeline
) -> CompiledModule:
    from transformers import PreTrainedModel

    from regraft.frontends.encoder import capture_encoder
    from regraft.frontends.module import capture_module, from_exported
    from regraft.runtime.encoder import CompiledEncoder

    if isinstance(model, PreTrainedModel):
        with capturing():
            program = capture_encoder(model, example_inputs, dynamic_shapes)
    elif isinstance(model, torch.export.ExportedProgram):
        program = from_exported(model, dynamic_shapes)
    elif not isinstance(model, torch.nn.Module):
        raise RegraftError(
            f"cannot compile a {type(model).__name__}: give a transformers model, a torch module, "
            "an exported program or an ONNX model"
        )
    elif example_inputs is None:
        raise RegraftError(
            f"cannot compile a {type(model).__name__} without example_inputs: give a tuple of "
            "positional inputs or a dict of keyword inputs"
        )
    else:
        with capturing():
            program = capture_module(model, example_inputs, dynamic_shapes)
    report = pipeline.run(("", program, STATELESS))
    compiled: CompiledModule
    if isinstance(model, PreTrainedModel):
        compiled = CompiledEncoder(program, report, model)
    else:
        compiled = CompiledModule(program, report)
    return compiled


def _check_target(model: Any, target: str) -> None:
    if target not in TARGETS:
        raise RegraftError(f"unknown target {target!r}: {', '.join(TARGETS)}")
    weights = model.parameters() if isinstance(model, torch.nn.Module) else ()
    device = next((weight.device for weight in weights), torch.device("cpu"))
    if target in ("cpu", "cuda") and device.type != target:
        raise RegraftError(f"the model is on {device}, the target is {target}: move the model")


def load(folder: str | Path) -> Any:
    """The compiled model that ``Compiled.save`` wrote, or the exported one of
    ``export_onnx`` run by onnxruntime; RegraftError where it is damaged."""
    folder = Path(folder)
    if (folder / "model.onnx").is_file():
        from regraft.runtime.onnx_lm import load_onnx

        return load_onnx(folder)
    from regraft.runtime.artefact import load

    return load(folder)
