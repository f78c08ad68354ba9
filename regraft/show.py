"""What the command line shows of programs, caches and ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table


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
