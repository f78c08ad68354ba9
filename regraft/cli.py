"""The ``regraft`` command."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from regraft import options, show

app = typer.Typer(
    help="Compile, transform and run transformer inference graphs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)
PROMPT = "Explain in two sentences why the sky is blue."
DEEP = 8192

MODEL = typer.Option(
    "smollm2", "--model", "-m", help="A model folder, a compiled one, a GGUF file, or smollm2."
)


def main() -> None:
    try:
        app()
    except Exception as error:
        from regraft import RegraftError

        if not isinstance(error, RegraftError):
            raise
        message = " ".join(str(error).split())
        err.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def demo() -> None:
    """Compile SmolLM2 with a 4-bit cache and let it answer a prompt."""
    model, tokenizer = _load("smollm2")
    compiled = _compile(model, options.passes("4"))
    out.print(compiled.report.table())
    cache = _generate(compiled, tokenizer, PROMPT, 48)
    per_token = compiled.program.cache_bytes(2)
    out.print(show.memory(cache.state.length, cache.nbytes, per_token))
    out.print(show.memory(DEEP, show.cache_bytes(compiled, DEEP), per_token))


@app.command("compile")
def compile_(
    model: str = typer.Argument(..., help="A model folder, a GGUF file, or smollm2."),
    folder: Path = typer.Argument(..., metavar="OUT", help="The folder to write."),
    kv_bits: str = options.BITS,
    weight_bits: str = options.WEIGHTS,
    weight_method: str = options.METHOD,
    recipe: Path | None = typer.Option(None, "--recipe", help="A YAML file that lists passes."),
    macs: float | None = typer.Option(None, "--macs", help="Prune to this share; needs --text."),
    text: Path | None = typer.Option(None, "--text", help="A text file to calibrate with."),
) -> None:
    """Compile a model into a folder that generate and inspect take."""
    passes = options.pruned(macs, text)
    passes += options.passes(kv_bits, weight_bits, weight_method, text)
    loaded, words = _load(model, tokenizer=text is not None)
    calibration = None if text is None else options.batches(text, words)
    compiled = _compile(loaded, passes, recipe, calibration=calibration)
    with _status(f"writing {folder}"):
        compiled.save(folder)
        if tokenizer := _tokenizer(_folder(model)):
            tokenizer.save_pretrained(folder)
    out.print(compiled.report.table())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    out.print(f"{folder}: {size / 2**20:.0f} MiB", markup=False)


@app.command()
def export(
    model: str = typer.Argument(..., help="A model folder, a GGUF file, or smollm2."),
    folder: Path = typer.Argument(..., metavar="OUT", help="The folder to write."),
    kv_bits: str = options.BITS,
    weight_bits: str = options.WEIGHTS,
    opset: int = typer.Option(21, "--opset", help="ONNX opset, 18 to 24."),
    functions: bool = typer.Option(True, help="Operators as functions."),
    contrib: bool = typer.Option(False, "--contrib", help="Use onnxruntime's operators."),
    force: bool = typer.Option(False, "--force", help="Replace OUT if it exists."),
    recipe: Path | None = typer.Option(None, "--recipe", help="A YAML file that lists passes."),
) -> None:
    """Export a model to an ONNX folder that onnxruntime runs, and check it there."""
    passes = options.passes(kv_bits, weight_bits)
    loaded, tokenizer = _load(model)
    compiled = _compile(loaded, passes, recipe, target="reference")
    with _status(f"exporting to {folder}"):
        written = compiled.export_onnx(
            folder,
            opset=opset,
            functions=functions,
            contrib=contrib,
            tokenizer=tokenizer,
            force=force,
        )
    out.print(str(written), markup=False, highlight=False, soft_wrap=True)


@app.command()
def generate(
    prompt: str = typer.Option(..., "--prompt", "-p"),
    model: str = MODEL,
    max_new_tokens: int = typer.Option(64, "--max-new-tokens", "-n", min=1),
    kv_bits: str = options.BITS,
    weight_bits: str = options.WEIGHTS,
) -> None:
    """Continue a prompt; chat models get it through their chat template."""
    compiled, tokenizer = _open(model, options.passes(kv_bits, weight_bits), tokenizer=True)
    _generate(compiled, tokenizer, prompt, max_new_tokens)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def inspect(
    context: typer.Context,
    file: str = typer.Argument("", metavar="[ONNX]", help="An .onnx file, as --model takes too."),
    model: str = MODEL,
    kv_bits: str = options.BITS,
    graph: bool = typer.Option(False, "--graph", help="Print the transformed graph."),
    diff: str = typer.Option("", "--diff", metavar="PASS", help="What this pass changed."),
    markdown: bool = typer.Option(False, "--markdown", help="--diff as Markdown."),
    coexec: str = typer.Option("", metavar="SCRIPT", help="Run it and show its co-execution."),
    picture: Path | None = typer.Option(None, help="--coexec as an .svg or .dot file."),
) -> None:
    """Show what a model compiles to, or how a script's co-execution ran."""
    from regraft import RegraftError, script

    if arguments := script.arguments(context, file, coexec):
        return script.inspect(arguments, picture, out.print)
    if (file or model).endswith(".onnx"):
        for table in show.onnx_tables(Path(file or model)):
            out.print(table)
        return
    if file:
        raise RegraftError(f"{file} is no .onnx file: name a model folder with --model")
    passes = options.passes(kv_bits)
    if diff:
        steps = show.steps(passes, diff)
        loaded, _ = _load(model, tokenizer=False)
        if isinstance(loaded, Path):
            raise RegraftError(f"--diff needs a model folder, and {model} is a GGUF file")
        with _status(f"compiling {type(loaded).__name__}"):
            text = show.difference(loaded, steps, markdown)
        return print(text or f"{diff} leaves the graph as it is")
    compiled, _ = _open(model, passes)
    if compiled.program is None:
        raise RegraftError(f"{model} is an export: inspect {model}/model.onnx")
    if graph:
        return print(compiled.program.text())
    out.print(show.signature(compiled.program))
    out.print(compiled.report.table())
    for row in compiled.report.rows:
        for where, reason in row.skipped[:4]:
            out.print(f"{row.name} skipped {where}: {reason}", markup=False)
    kept, dense = show.cache_bytes(compiled, DEEP) / DEEP, compiled.program.cache_bytes(2)
    out.print(f"{compiled!r}", markup=False)
    out.print(f"cache: {kept:,.0f} bytes a token at {DEEP} tokens (float16 dense: {dense:,})")


@app.command()
def passes() -> None:
    """List the passes and their settings."""
    from regraft.passes import registry

    table = Table()
    for column in ("pass", "what it does", "settings"):
        table.add_column(column)
    for name, kind in sorted(registry.items()):
        default = kind()
        settings = ", ".join(f"{key}={value}" for key, value in default.settings().items())
        line = " ".join((kind.__doc__ or "").strip().splitlines()[0].split())
        table.add_row(name, escape(line), settings or "-")
    out.print(table)


@app.command()
def bench(
    suite: str = typer.Argument(..., help="A suite's name; an unknown one lists them."),
    quick: bool = typer.Option(False, "--quick", help="A subset, in about a minute."),
    json: Path | None = typer.Option(None, "--json", help="Write JSON here, .md and .png beside."),
    output: str = typer.Option("md", "--output", "-o", help="md, json or csv on stdout."),
    onnx: Path | None = typer.Option(None, "--onnx", help="decode: a folder with a model.onnx."),
) -> None:
    """Run a benchmark suite."""
    from regraft import RegraftError
    from regraft.benchmarks import SUITES

    if suite not in SUITES:
        raise RegraftError(f"unknown suite {suite!r}: {', '.join(SUITES)}")
    if output not in ("md", "json", "csv"):
        raise RegraftError(f"unknown output {output!r}: md, json or csv")
    if onnx is not None and suite != "decode":
        raise RegraftError("--onnx belongs to the suite decode")
    _hush()
    options = {"onnx": onnx} if onnx is not None else {}
    result = import_module(SUITES[suite]).run(quick, **options)
    if json is not None:
        result.write(json)
    texts = {"md": result.to_markdown, "json": result.to_json, "csv": result.to_csv}
    print(texts[output]())


def _hush() -> None:
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def _status(text: str) -> Iterator[None]:
    with err.status(text):
        yield


def _folder(name: str) -> Path:
    from regraft.assets import smollm2

    return smollm2() if name == "smollm2" else Path(name)


def _load(name: str, tokenizer: bool = True) -> tuple[Any, Any]:
    with _status("starting transformers"):
        import torch
        from transformers import AutoModelForCausalLM

        from regraft import RegraftError

        _hush()
    folder = _folder(name)
    if _is_gguf(folder):
        words = _tokenizer(folder) if tokenizer and folder.is_file() else None
        if tokenizer and words is None and folder.is_file():
            raise RegraftError(f"{name} has no tokenizer that can be read: give a folder with one")
        return folder, words
    if _is_artefact(folder):
        raise RegraftError(f"{name} is compiled already: name the model it was compiled from")
    if not (folder / "config.json").is_file():
        raise RegraftError(f"{name} is not a model folder: it has no config.json")
    with _status(f"loading {folder.name}"):
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise RegraftError(f"{name} cannot be loaded: {error}") from error
        words = _tokenizer(folder) if tokenizer else None
    if tokenizer and words is None:
        raise RegraftError(f"{name} has no tokenizer: put its files into the folder")
    return model.eval(), words


def _is_artefact(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("regraft.json", "model.onnx"))


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, None where it has none, or of a GGUF file, None where unknown."""
    from transformers import AutoTokenizer

    from regraft import RegraftError

    if _is_gguf(folder):
        try:
            return AutoTokenizer.from_pretrained(folder.parent, gguf_file=folder.name)
        except Exception:
            return None
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise RegraftError(f"the tokenizer in {folder} cannot be loaded: {error}") from error


def _open(name: str, passes: list[Any], tokenizer: bool = False) -> tuple[Any, Any]:
    """A model compiled now, or the one that `regraft compile` wrote there."""
    folder = Path(name)
    if not _is_artefact(folder):
        model, words = _load(name, tokenizer)
        return _compile(model, passes), words
    import regraft

    if passes:
        raise regraft.RegraftError(
            f"{name} is compiled already, with its own cache: leave out --kv-bits"
        )
    with _status(f"loading {folder.name}"):
        _hush()
        words = _tokenizer(folder) if tokenizer else None
        if tokenizer and words is None:
            raise regraft.RegraftError(f"{name} has no tokenizer: put its files into the folder")
        return regraft.load(folder), words


def _compile(
    model: Any,
    passes: list[Any],
    recipe: Path | None = None,
    target: str = "cpu",
    calibration: list[Any] | None = None,
) -> Any:
    import regraft

    return regraft.compile(
        model, passes, recipe=recipe, target=target, calibration=calibration, fallback="error"
    )


def _generate(compiled: Any, tokenizer: Any, prompt: str, count: int) -> Any:
    from transformers import TextStreamer

    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids, cache = inputs["input_ids"], compiled.new_cache()
    start = time.perf_counter()
    made = compiled.generate(
        ids,
        attention_mask=inputs["attention_mask"],
        past_key_values=cache,
        max_new_tokens=count,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    seconds = time.perf_counter() - start
    new = made.shape[1] - ids.shape[1]
    err.print(f"{new} tokens in {seconds:.1f} s, prompt included: {new / seconds:.1f} tokens/s")
    return cache


if __name__ == "__main__":
    main()
