"""Multi-head latent attention reads its cache as it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from regraft.passes.base import Context, Pass, PassResult, is_call
from regraft.passes.regions import between, call, evaluate
from regraft.program import Program
from regraft.program.program import source_of

aten = torch.ops.aten
regraft = torch.ops.regraft


@dataclass(frozen=True)
class RaiseLatent(Pass):
    """attention(q, [W_k c; r], W_v c) -> W_v' attention([W_k' q_n; q_r], [c; r], c)

    Exact up to the order of sums. Heads share the cached latent c and rotated part r of multi-head
    latent attention; absorbing W_k and W_v into queries and outputs, nothing is expanded per
    cached token. The cache then holds keys [c; r] and values c of one head. Source: DeepSeek-V2
    (arXiv 2405.04434), section 2.1.2.
    """

    def apply(self, program: Program, context: Context) -> PassResult:
        matches, skipped = 0, []
        for node in program.graph.find_nodes(op="call_function", target=regraft.attention.default):
            updates = _updates(node)
            if len(updates) != 2 or updates == list(node.args[1:3]):
                continue
            reason = _absorb(program, node, updates)
            matches += not reason
            if reason:
                skipped.append((source_of(node), reason))
        return PassResult(matches, tuple(skipped))


def _updates(attention: fx.Node) -> list[fx.Node]:
    """The cached tensors that keys and values are made of; none if they are made of others."""
    found, seen, stack = set(), set(), list(attention.args[1:3])
    while stack:
        node: Any = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_call(node, regraft.kv_update.default):
            found.add(node)
        elif node.op == "placeholder":
            return []
        elif node.op == "call_function" and not isinstance(node.meta.get("val"), torch.SymInt):
            stack.extend(node.all_input_nodes)
    return sorted(found)


def _absorb(program: Program, node: fx.Node, updates: list[fx.Node]) -> str:
    """Rewrite one attention; why it cannot be."""
    graph = program.graph
    placeholders = graph.find_nodes(op="placeholder")
    latent, rope = sorted(updates, key=lambda update: placeholders.index(update.args[0]))
    slot = placeholders.index(latent.args[0])
    if placeholders.index(rope.args[0]) != slot + 1 or any(
        update.meta["val"].shape[1] != 1 for update in updates
    ):
        return "its keys mix the caches of more than one head"
    inside = between(graph, updates, node.args[1:3])  # type: ignore[arg-type]
    outside = {user for update in updates for user in update.users} - {*inside, node}
    if outside - {graph.output_node()}:
        return "its cache is read elsewhere"
    q, _, _, mask, sinks, scale, softcap = node.args
    measured = _matrices(program, node, latent, rope)
    if isinstance(measured, str):
        return measured
    keys, rotated, values = measured
    first = rotated[0].any(0).nonzero().flatten()
    begin, width = int(first[0]), rotated.shape[1]
    wanted = torch.zeros_like(rotated)
    wanted[:, :, begin : begin + width] = torch.eye(width, dtype=wanted.dtype)
    if not torch.equal(rotated, wanted) or keys[:, :, begin : begin + width].any():
        return "the rotated part of its keys has no channels of its own"
    with graph.inserting_before(node):
        pieces = _cut(graph, q, begin, begin + width)
        keys = torch.cat([keys[:, :, :begin], keys[:, :, begin + width :]], -1)
        turned = pieces.pop(1 if begin else 0)
        plain = pieces[0] if len(pieces) == 1 else call(graph, aten.cat.default, pieces, -1)
        weight = _constant(program, f"{node.name}_keys", keys)
        absorbed = call(graph, aten.einsum.default, "bhsd,hld->bhsl", [plain, weight])
        q = call(graph, aten.cat.default, [absorbed, turned], -1)
        k = call(graph, aten.cat.default, [latent.args[1], rope.args[1]], -1)
        _widen(program, slot, k.meta["val"].shape[-1])
        key = call(graph, regraft.kv_update.default, placeholders[slot], k)
        value = call(graph, regraft.kv_update.default, placeholders[slot + 1], latent.args[1])
        out = call(graph, regraft.attention.default, q, key, value, mask, sinks, scale, softcap)
        out.meta = {**node.meta, "val": out.meta["val"]}
        weight = _constant(program, f"{node.name}_values", values)
        result = call(graph, aten.einsum.default, "bhsl,hld->bhsd", [out, weight])
    node.replace_all_uses_with(result)
    output = graph.output_node()
    latent.replace_all_uses_with(key, lambda user: user is output)
    rope.replace_all_uses_with(value, lambda user: user is output)
    graph.erase_node(node)
    for dead in reversed(inside):
        graph.erase_node(dead)
    graph.erase_node(latent)
    graph.erase_node(rope)
    return ""


def _matrices(program, node, latent, rope) -> tuple[Tensor, Tensor, Tensor] | str:
    """Maps [heads, in, out] from the latent and the rotated part to keys, and to values."""
    placeholders = program.graph.find_nodes(op="placeholder")
    examples = dict(zip(placeholders, program.examples, strict=True))
    past, total = examples[latent.args[0]], latent.meta["val"].shape[2]
    batch, length = (
        past.shape[0],
        int(total.node.hint if isinstance(total, torch.SymInt) else total),
    )
    sizes = [int(update.meta["val"].shape[-1]) for update in (latent, rope)]

    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, heads, size] of cached rows [rows, latent + rotated]."""
        found = []
        for part in rows.split(batch * length):
            full = part.new_zeros(batch * length, part.shape[1])
            full[: len(part)] = part
            pieces = full.view(batch, 1, length, -1).split(sizes, -1)
            env = {**examples, latent: pieces[0], rope: pieces[1]}
            results = [evaluate(program, end, env) for end in node.args[1:3]]
            found.append([r.transpose(1, 2).flatten(0, 1)[: len(part)] for r in results])
        keys, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        return keys, values

    basis = torch.eye(sum(sizes), dtype=past.dtype, device=past.device)
    keys, values = run(basis)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3 * batch * length, sum(sizes), generator=generator).to(basis)
    for got, matrix in zip(run(rows), (keys, values), strict=True):
        expected = torch.einsum("nl,lhd->nhd", rows, matrix)
        if (got - expected).abs().max() > 1e-2 * expected.abs().max() * (
            1e-3 if past.dtype == torch.float32 else 1
        ):
            return "its keys and values are no linear functions of the cache"
    if values[sizes[0] :].any():
        return "its values depend on the rotated part of the keys"
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)
    return keys[:, : sizes[0]], keys[:, sizes[0] :], values[:, : sizes[0]].contiguous()


def _cut(graph: fx.Graph, q: Any, begin: int, end: int) -> list[fx.Node]:
    """q before, in and after channels begin to end; the parts of a concatenation if it is one."""
    size = int(q.meta["val"].shape[-1])
    edges = [(a, b) for a, b in ((0, begin), (begin, end), (end, size)) if a < b]
    if is_call(q, aten.cat.default) and q.args[1] in (-1, 3):
        widths = [int(part.meta["val"].shape[-1]) for part in q.args[0]]
        if widths == [b - a for a, b in edges]:
            return list(q.args[0])
    return [call(graph, aten.slice.Tensor, q, -1, a, b) for a, b in edges]


def _constant(program: Program, name: str, tensor: Tensor) -> fx.Node:
    parameter = torch.nn.Parameter(tensor.contiguous(), requires_grad=False)
    program.graph_module.register_parameter(name, parameter)
    node = program.graph.get_attr(name)
    node.meta["val"] = parameter
    return node


def _widen(program: Program, slot: int, size: int) -> None:
    """Make state ``slot`` hold the latent and the rotated part, and the next the latent."""
    placeholders = program.graph.find_nodes(op="placeholder")[slot : slot + 2]
    inputs, outputs = list(program.inputs), list(program.outputs)
    examples = list(program.examples)
    vals = [node.meta["val"] for node in placeholders]
    shown = [torch.cat(vals, -1), vals[0]]
    held = [torch.cat(examples[slot : slot + 2], -1), examples[slot]]
    present = slot - len(inputs)
    for i in range(2):
        placeholders[i].meta["val"] = shown[i]
        examples[slot + i] = held[i]
        for specs, place in ((inputs, slot + i), (outputs, present + i)):
            spec = specs[place]
            specs[place] = replace(spec, shape=(*spec.shape[:3], held[i].shape[-1]))
    program.inputs, program.outputs = tuple(inputs), tuple(outputs)
    program.examples = tuple(examples)
