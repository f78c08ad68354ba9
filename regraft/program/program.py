"""Program: an fx graph of ATen and ``regraft::`` operators with a named signature."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from regraft.program.errors import RegraftError

tracing = threading.RLock()
"""Held by whoever traces or rewrites graphs: torch.export and fx patch what all threads share."""


@dataclass(frozen=True)
class TensorSpec:
    """A named input or output; a dimension is an int or the name of a dynamic size."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    role: str


@dataclass(frozen=True)
class LayerState:
    """How the runtime keeps one attention layer: ``format`` is "dense" or "kvquant"; tensors are
    what was calibrated for it."""

    format: str = "dense"
    settings: tuple[tuple[str, Any], ...] = ()
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class CacheSpec:
    """``layers``: one entry a layer that caches keys and values, in layer order. ``states``:
    tensors of constant size that each step replaces (convolutions, recurrences), zero before the
    first token; the last ``rollback`` steps can be taken back. ``kernels``: whether quantised
    layers run compiled kernels or their reference."""

    layers: tuple[LayerState, ...] = ()
    states: tuple[TensorSpec, ...] = ()
    rollback: int = 8
    kernels: bool = True


@dataclass
class Program:
    """A step: tokens and past states in, logits and present states out.

    tokens: the fewest and the most tokens that a call takes, None for any number. prefill: the
    same step over several tokens, for models that compute one token by other code; its inputs
    and outputs are those of the program. context: the most tokens, past ones included, that the
    graph serves, None for any number.
    """

    graph_module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cache: CacheSpec = CacheSpec()
    examples: tuple[torch.Tensor, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    tokens: tuple[int, int | None] = (1, None)
    prefill: Program | None = None
    context: int | None = None

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def parts(self) -> dict[str, Program]:
        """The program and its prefill, if it has one, by the prefix that names their tensors."""
        return {"": self} if self.prefill is None else {"": self, "prefill.": self.prefill}

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the functional graph: past states in, present states out."""
        with torch.no_grad():
            return self.graph_module(*inputs)

    def cache_bytes(self, size: int) -> int:
        """Bytes a token of dense cache whose elements take ``size`` bytes."""
        states = [spec for spec in self.inputs if spec.role == "cache"]
        return sum(size * spec.shape[1] * spec.shape[3] for spec in states)  # type: ignore

    def copy(self) -> Program:
        """The same weights, a graph of its own."""
        copied = fx.Graph()
        output = copied.graph_copy(self.graph, {})
        copied.output(output)
        module = fx.GraphModule(self.graph_module, copied)
        prefill = None if self.prefill is None else self.prefill.copy()
        return replace(self, graph_module=module, metadata=dict(self.metadata), prefill=prefill)

    def verify(self) -> None:
        """Raise when the graph is malformed or no longer carries its signature."""
        try:
            self.graph.lint()
        except RuntimeError as error:
            raise RegraftError(f"the graph is malformed: {error}") from error
        placeholders = self.graph.find_nodes(op="placeholder")
        if len(placeholders) != len(self.inputs):
            raise RegraftError(
                f"{len(placeholders)} placeholders for {len(self.inputs)} inputs of the signature"
            )
        outputs: Any = self.graph.output_node().args[0]
        if len(outputs) != len(self.outputs):
            raise RegraftError(
                f"{len(outputs)} graph outputs for {len(self.outputs)} outputs of the signature"
            )

    def text(self) -> str:
        """One line a node: name, operator, arguments, dtype and shape, and where it comes from.

        Graphs that are called follow, each once, indented.
        """
        return "\n".join(_lines(self.graph_module))

    def diff(self, other: Program) -> str:
        """Unified diff of the two printed graphs."""
        return "\n".join(
            difflib.unified_diff(self.text().split("\n"), other.text().split("\n"), lineterm="")
        )

    def diff_markdown(self, other: Program, title: str = "Program") -> str:
        """The diff as a Markdown section: what changed in numbers, then the lines."""
        lines = self.diff(other).split("\n")[2:]
        gone, new = (sum(line.startswith(sign) for line in lines) for sign in "-+")
        counts = f"{len(self.graph.nodes)} -> {len(other.graph.nodes)} nodes, lines -{gone} +{new}"
        block = "\n".join(["", "```diff", *lines, "```"]) if gone or new else ""
        return f"## {title}\n\n{counts}\n{block}"


def _lines(module: fx.GraphModule) -> list[str]:
    lines, called = [], {}
    for node in module.graph.nodes:
        spec = spec_of(node)
        shape = f" : {spec[0]} [{', '.join(map(str, spec[1]))}]" if spec else ""
        arguments = ", ".join(map(str, node.args)) if node.op != "placeholder" else ""
        source = source_of(node)
        place = f"  # {source}" if source != node.name else ""
        lines.append(f"{node.name} = {node.target}({arguments}){shape}{place}")
        if node.op == "call_module":
            called[str(node.target)] = module.get_submodule(str(node.target))
    for name, inner in called.items():
        if isinstance(inner, fx.GraphModule):
            lines += ["", f"{name}:", *(f"    {line}" for line in _lines(inner))]
    return lines


def spec_of(node: fx.Node) -> tuple[torch.dtype, tuple[int | str, ...]] | None:
    """dtype and dimensions of a node's tensor, dynamic ones as their symbol; None for others."""
    value = node.meta.get("val")
    if torch.is_tensor(value):
        return value.dtype, tuple(n if isinstance(n, int) else str(n) for n in value.shape)
    return node.meta.get("spec")


def source_of(node: fx.Node) -> str:
    """The module path and line of source that a node was captured from, for messages."""
    if "source" in node.meta:
        return node.meta["source"]
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else node.name
