"""Weights that a GGUF file keeps in blocks stay in blocks."""

from __future__ import annotations

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
        for index, node in enumerate(nodes):
            context.tell(f"weights {index + 1} of {len(nodes)}")
            source, name = sources[str(node.target)], str(node.target)
            for user in list(node.users):
                if not _reads(user, node):
                    continue
                if (packed := made.get(source.name)) is None:
                    packed = made[source.name] = source.packed()
                own = program.metadata.setdefault("packed", {})
                own[f"{name}_packed"] = [source.name]
                weight = put(program, f"{name}_packed", packed, user)
                replace = (
                    replace_linear if is_call(user, aten.linear.default) else replace_embedding
                )
                replace(program, user, weight, source.format)
                matches += 1
            if node.users:
                skipped.append((name, f"read by {next(iter(node.users)).name}: kept as floats"))
                dense = source.dense() if source.order is None else source.dense()[source.order]
                setattr(program.graph_module, name, torch.nn.Parameter(dense, False))
        return PassResult(matches, tuple(skipped))


def _reads(user: fx.Node, weight: fx.Node) -> bool:
    """Whether it is a linear layer or an embedding with these weights."""
    linear = is_call(user, aten.linear.default) and user.args[1] is weight
    embedding = is_call(user, aten.embedding.default) and user.args[0] is weight
    return (linear and user.args[0] is not weight) or embedding
