"""A compiled causal language model as a folder that onnxruntime and onnxruntime-genai run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from regraft.frontends.export.builder import Builder
from regraft.frontends.export.convert import convert
from regraft.frontends.export.files import MODEL, Exported, checked_target, written
from regraft.frontends.export.genai import fits, genai_config
from regraft.frontends.export.kvquant import quantized_lengths
from regraft.program import Program, Report


def export(
    compiled: Any,
    folder: str | Path,
    *,
    opset: int = 21,
    functions: bool = True,
    contrib: bool = False,
    tokenizer: Any = None,
    force: bool = False,
) -> Exported:
    """See ``Compiled.export_onnx``."""
    from regraft.frontends.export.check import check

    folder = checked_target(folder, opset, force)
    model, fused = to_onnx(compiled.program, compiled.report, opset, functions, contrib)
    cache = compiled.program.cache
    with written(folder, model) as made:
        compiled.config.save_pretrained(made)
        compiled.generation_config.save_pretrained(made)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        if fits(cache):
            settings = genai_config(compiled.config, compiled.generation_config, model.graph)
            (made / "genai_config.json").write_text(json.dumps(settings, indent=2))
        errors = check(made / MODEL, compiled, together="GroupQueryAttention" not in fused)
    return Exported.of(folder, model, errors, fused)


def to_onnx(
    program: Program,
    report: Report,
    opset: int = 21,
    functions: bool = True,
    contrib: bool = False,
) -> tuple[ir.Model, dict[str, int]]:
    """The step of a program as one model, prefill, decode and verification alike; and how many of
    onnxruntime's own operators it uses."""
    from regraft import __version__

    builder = Builder(opset, functions, contrib)
    model = convert(_prepared(program), builder, __version__)
    rows = [{"pass": row.name, "matches": row.matches} for row in report.rows]
    layers = sorted({layer.format for layer in program.cache.layers})
    model.metadata_props.update(
        regraft_version=__version__, regraft_passes=json.dumps(rows), regraft_cache=",".join(layers)
    )
    if program.cache.states:
        states = [spec.name for spec in program.cache.states]
        model.metadata_props["regraft_states"] = json.dumps(states)
    contexts = [part.context for part in program.parts.values() if part.context is not None]
    if contexts:
        model.metadata_props["regraft_context"] = str(min(contexts))
    settings = [dict(layer.settings) for layer in program.cache.layers if layer.settings]
    if settings:
        model.metadata_props["regraft_cache_settings"] = json.dumps(settings)
    return model, builder.fused


def _prepared(program: Program) -> Program:
    whole = quantized_lengths(_without_choice(program))
    return replace(whole, prefill=program.prefill and _prepared(program.prefill))


def _without_choice(program: Program) -> Program:
    """The program with the logits of all tokens, not of those to keep."""
    copied = program.copy()
    graph = copied.graph
    nodes = graph.find_nodes(op="placeholder")
    index = next(i for i, spec in enumerate(program.inputs) if spec.name == "logits_to_keep")
    keep = nodes[index]
    for user in list(keep.users):
        if user.target is torch.ops.aten.index.Tensor and user.args[1] == [None, keep]:
            user.replace_all_uses_with(user.args[0])
            graph.erase_node(user)
    if keep.users:
        _keep_all(graph, nodes[0], keep)
    graph.erase_node(keep)
    copied.graph_module.recompile()

    def renamed(spec: Any) -> Any:
        return replace(
            spec, shape=tuple("sequence_length" if n == "kept" else n for n in spec.shape)
        )

    return replace(
        copied,
        inputs=tuple(spec for i, spec in enumerate(program.inputs) if i != index),
        outputs=tuple(renamed(spec) for spec in program.outputs),
    )


def _keep_all(graph: fx.Graph, ids: fx.Node, keep: fx.Node) -> None:
    """Let what reads the positions to keep read all of them."""
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        length = graph.call_function(torch.ops.aten.sym_size.int, (ids, 1))
        every = graph.call_function(torch.ops.aten.arange.default, (length,))
    every.meta["spec"] = torch.int64, ("sequence_length",)
    keep.replace_all_uses_with(every)
