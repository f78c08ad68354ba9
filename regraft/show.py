"""What the command line shows of programs, caches, ONNX files and co-execution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

SHOWN = 12  # rows of fetches, fallbacks and segments: those that cost most


def memory(tokens: int, kept: int, dense: int) -> str:
    """A line on the bytes that a cache keeps; dense: those of a token in float16."""
    share = kept / (tokens * dense)
    return (
        f"cache of {tokens} tokens: {kept / 2**20:.2f} MiB, "
        f"float16 dense {tokens * dense / 2**20:.2f} MiB ({share:.0%})"
    )


def _states(program: Any) -> list[Any]:
    return [spec for spec in program.inputs if spec.role == "cache"]


def cache_bytes(compiled: Any, tokens: int) -> int:
    """Measured: a layer of each kind filled with this many random keys and values."""
    import torch

    states = iter(_states(compiled.program))
    kinds = compiled.program.cache.layers
    layers = compiled.new_cache().state.layers
    sizes: dict[Any, int] = {}
    total = 0
    for kind, layer, *pair in zip(kinds, layers, states, states, strict=True):
        key = (kind, pair[0].shape, pair[1].shape)
        if key not in sizes:
            k, v = (torch.randn(1, s.shape[1], tokens, s.shape[3]).to(s.dtype) for s in pair)
            layer.step(k[:, :, :1], k, v)
            sizes[key] = layer.nbytes
        total += sizes[key]
    return total


def signature(program: Any) -> Table:
    """Inputs and outputs of a program, one layer's states for all."""
    table = Table(title="signature")
    for column in ("name", "dtype", "shape"):
        table.add_column(column)
    for kind, specs in (("in", program.inputs), ("out", program.outputs)):
        states = [spec for spec in specs if spec.role == "cache"]
        for spec in [spec for spec in specs if spec.role != "cache"] + states[:2]:
            shape = ", ".join(map(str, spec.shape))
            table.add_row(f"{kind} {spec.name}", str(spec.dtype).split(".")[-1], shape)
        if len(states) > 2:
            table.add_row(f"{kind} ... {len(states) - 2} more states", "", "")
    return table


def steps(asked: list[Any], target: str) -> list[Any]:
    """The passes up to the one of this name, which need not be among those asked for."""
    from regraft.passes import DEFAULT, FINAL, pass_named

    found = [*DEFAULT, *asked, *FINAL]
    names = [type(step).__name__ for step in found]
    if target in names:
        return found[: names.index(target) + 1]
    return [*found, pass_named(target)]


def difference(model: Any, steps: list[Any], markdown: bool) -> str:
    """What the last of the passes changes of a model; empty: nothing."""
    from regraft.frontends.huggingface import capture
    from regraft.passes import Context, run

    program, context = capture(model), Context()
    run(program, steps[:-1], context)
    after = program.copy()
    run(after, steps[-1:], context)
    name = type(steps[-1]).__name__
    return program.diff_markdown(after, name) if markdown else program.diff(after)


def onnx_tables(path: Path) -> list[Table]:
    from collections import Counter

    from regraft.frontends.onnx.read import read

    model = read(path)
    values = Table("name", "type", "shape", title="signature")
    for kind, group in (("in", model.graph.inputs), ("out", model.graph.outputs)):
        for value in group:
            shape = "?" if value.shape is None else ", ".join(str(dim) for dim in value.shape)
            values.add_row(escape(f"{kind} {value.name}"), escape(str(value.type)), shape)
    bodies = [model.graph, *(function.graph for function in model.functions.values())]
    counted = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for body in bodies
        for node in body.all_nodes()
    )
    operators = Table("operator", "count", title="operators")
    for name, count in counted.most_common():
        operators.add_row(escape(name), str(count))
    facts = Table("fact", "value", title="file")
    for domain, version in sorted(model.opset_imports.items()):
        facts.add_row(f"opset of {escape(domain or 'ai.onnx')}", str(version))
    outside = _external_files(model, path)
    size = sum(file.stat().st_size for file in {path, *outside})
    facts.add_row("size on disk", f"{size / 2**20:,.2f} MiB in {1 + len(outside)} files")
    return [values, operators, facts]


def _external_files(model: Any, path: Path) -> set[Path]:
    weights = [value.const_value for value in model.graph.initializers.values()]
    return {path.parent / str(w.location) for w in weights if hasattr(w, "location")}


def coexecution(report: Any) -> list[Table]:
    """What a Report of co-execution says; nothing is shown of what there is none of."""
    ops, back = (report.deferred, report.recorded, report.at_once), report.backwards
    total = sum(ops)
    facts = Table("co-execution", "", title=escape(report.name), title_justify="left")
    shares = zip(("put off", "recorded", "at once"), ops, strict=True)
    rows = {
        "mode": f"{report.mode}, {report.calls:,} call{'s' * (report.calls != 1)}",
        "operators": ", ".join(f"{n:,} {what} ({n / max(total, 1):.0%})" for what, n in shares),
        "backward passes": f"{back} put off, {report.backwards_eager} at once",
        "paths": f"{len(report.paths)} over {report.nodes:,} nodes",
        "Python stall": f"{report.stall_s:.3f} s waiting for operators",
        "graph stall": f"{report.graph_stall_s:.3f} s or more without an operator to run",
        "run": f"{report.executed_aside:,} operators aside in {report.aside_s:.3f} s, "
        f"{report.executed_here:,} by Python's thread",
    }
    if report.eager_s is not None and report.coexecuted_s is not None:
        rows["a call"] = f"{report.eager_s * 1e3:.3f} ms eager, {report.coexecuted_s * 1e3:.3f} so"
    if report.segments:
        rows["segments"] = f"{report.compiled} in {report.compile_s:.1f} s"
    for name, text in rows.items():
        facts.add_row(name, escape(text))
    fetches = Table("Python waits at", "times", "seconds", "ms each")
    for line, (waits, seconds) in _most(report.fetches, lambda pair: pair[1]):
        fetches.add_row(_here(line), f"{waits:,}", f"{seconds:.4f}", f"{seconds / waits * 1e3:.3f}")
    fallbacks = Table("at once, because of", "operators")
    for reason, operators in _most(report.fallbacks, int):
        fallbacks.add_row(escape(reason), f"{operators:,}")
    segments = Table("segment of", "launches", "seconds to compile", "state")
    longest = sorted(report.segments, key=lambda segment: -segment[0] * segment[1])
    for length, launches, seconds, state in longest[:SHOWN]:
        segments.add_row(f"{length} operators", f"{launches:,}", f"{seconds:.2f}", escape(state))
    return [facts, *(table for table in (fetches, fallbacks, segments) if table.row_count)]


def _most(counts: dict[str, Any], cost: Callable[[Any], float]) -> list[Any]:
    return sorted(counts.items(), key=lambda item: -cost(item[1]))[:SHOWN]


def _here(line: str) -> str:
    """A path and line, from the working directory where it is below that."""
    path = Path(line)
    return escape(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
