"""Weights that a GGUF file keeps in blocks stay in blocks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx

from regraft.passes.base import Context, Pass, PassResult, is_call
from regraft.passes.packed import aten, put, replace_embedding, replace_linear
from regraft.program import Program


@dataclass(frozen=True)
class KeepPacked(Pass):
    """linear(x, W), embedding(W, ids) -> packed_linear, packed_embedding of the file's own blocks

    Exact, the rounding of activations to 15 bits aside. Comes first when ``compile`` is given a
    GGUF file: until then its weights are placeholders. What is read in another way becomes floats.
    """

    tolerance: ClassVar[float | None] = None

    def apply(self, program: Program, context: Context) -> PassResult:
        sources: dict[str, Any] = program.metadata.pop("gguf", {})
        made = context.notes.setdefault("packed", WeakValueDictionary[str, Tensor]())
        matches, skipped = 0, list(program.metadata.pop("gguf dense", ()))
        if not sources:
            skipped.append(("weights", 'they come from no GGUF file: compile("model.gguf")'))
        nodes = [n for n in program.graph.find_nodes(op="get_attr") if n.target in sources]
        groups = _groups(nodes, sources)
        for index, group in enumerate(groups):
            context.tell(f"weights {index + 1} of {len(groups)}")
            held = _read(group, sources, made)
            for node, packed in zip(group, held, strict=True):
                matches += _replace(program, node, packed, sources[str(node.target)])
        for node in nodes:
            if node.users:
                source, name = sources[str(node.target)], str(node.target)
                skipped.append((name, f"read by {next(iter(node.users)).name}: kept as floats"))
                dense = source.dense() if source.order is None else source.dense()[source.order]
                setattr(program.graph_module, name, torch.nn.Parameter(dense, False))
        return PassResult(matches, tuple(skipped))


def _groups(nodes: list[fx.Node], sources: dict[str, Any]) -> list[list[fx.Node]]:
    """Weights that the same input meets, in the same format: FuseLinear will join them."""
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in nodes:
        users = [user for user in node.users if _reads(user, node)]
        if users:
            alone = len(node.users) > 1 or is_call(users[0], aten.embedding.default)
            format = sources[str(node.target)].format
            groups[node if alone else (users[0].args[0], format)].append(node)
    return list(groups.values())


def _read(group: list[fx.Node], sources: dict[str, Any], made: Any) -> list[Tensor]:
    from regraft.kernels.linear.gguf_file import packed_together

    own = [sources[str(node.target)] for node in group]
    held = [made.get(source.name) for source in own]
    if any(packed is None for packed in held):
        held = packed_together(own)[1]
    for source, packed in zip(own, held, strict=True):
        made[source.name] = packed
    return held


def _replace(program: Program, node: fx.Node, packed: Tensor, source: Any) -> int:
    """Let the readers of a weight read it packed; how many there were."""
    name = f"{node.target}_packed"
    readers = [user for user in node.users if _reads(user, node)]
    program.metadata.setdefault("packed", {})[name] = [source.name]
    for user in readers:
        weight = put(program, name, packed, user)
        replace = replace_linear if is_call(user, aten.linear.default) else replace_embedding
        replace(program, user, weight, source.format)
    return len(readers)


def _reads(user: fx.Node, weight: fx.Node) -> bool:
    """Whether it is a linear layer or an embedding with these weights."""
    linear = is_call(user, aten.linear.default) and user.args[1] is weight
    embedding = is_call(user, aten.embedding.default) and user.args[0] is weight
    return (linear and user.args[0] is not weight) or embedding
