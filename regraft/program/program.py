"""Program: an fx graph of ATen and ``regraft::`` operators with a named signature."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from regraft.program.errors import RegraftError


@dataclass(frozen=True)
class TensorSpec:
    """A named input or output; a dimension is an int or the name of a dynamic size."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    role: str


@dataclass(frozen=True)
class LayerState:
    """How the runtime keeps one attention layer: ``format`` is "dense" or "kvquant"."""

    format: str = "dense"
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class CacheSpec:
    """One state a layer that caches keys and values, in layer order."""

    layers: tuple[LayerState, ...] = ()


@dataclass
class Program:
    graph_module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cache: CacheSpec = CacheSpec()
    examples: tuple[torch.Tensor, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the functional graph: past states in, present states out."""
        with torch.no_grad():
            return self.graph_module(*inputs)

    def copy(self) -> Program:
        """The same weights, a graph of its own."""
        copied = fx.Graph()
        output = copied.graph_copy(self.graph, {})
        copied.output(output)
        module = fx.GraphModule(self.graph_module, copied)
        return Program(
            module, self.inputs, self.outputs, self.cache, self.examples, dict(self.metadata)
        )

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
        """One line a node: name, operator, arguments, dtype and shape."""
        lines = []
        for node in self.graph.nodes:
            spec = spec_of(node)
            shape = f" : {spec[0]} [{', '.join(map(str, spec[1]))}]" if spec else ""
            arguments = ", ".join(map(str, node.args)) if node.op != "placeholder" else ""
            lines.append(f"{node.name} = {node.target}({arguments}){shape}")
        return "\n".join(lines)

    def diff(self, other: Program) -> str:
        """Unified diff of the two printed graphs."""
        return "\n".join(
            difflib.unified_diff(self.text().split("\n"), other.text().split("\n"), lineterm="")
        )


def spec_of(node: fx.Node) -> tuple[torch.dtype, tuple[int | str, ...]] | None:
    """dtype and dimensions of a node's tensor, dynamic ones as their symbol; None for others."""
    value = node.meta.get("val")
    if torch.is_tensor(value):
        return value.dtype, tuple(n if isinstance(n, int) else str(n) for n in value.shape)
    return node.meta.get("spec")


def source_of(node: fx.Node) -> str:
    """The module path a node was captured from, for messages."""
    if "source" in node.meta:
        return node.meta["source"]
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else node.name
