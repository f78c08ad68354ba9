"""A functional program to one that keeps its state: past and present become a cache object."""

from __future__ import annotations

import copy
from itertools import pairwise
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from regraft.kernels.kvquant.codebook import Codebook, fixed
from regraft.kernels.linear.formats import HALVES
from regraft.kernels.linear.reference import linear
from regraft.kernels.ops import causal_mask
from regraft.program import CacheSpec, LayerState, Program, RegraftError
from regraft.program.serialize import submodule
from regraft.runtime.buffer import RotationTable
from regraft.runtime.cache import CacheState, DenseLayer
from regraft.runtime.quantized import Coding, QuantizedLayer
from regraft.runtime.recurrent import RecurrentStates
from regraft.runtime.regions import Region, is_decode

regraft = torch.ops.regraft


def lower(program: Program) -> tuple[fx.GraphModule, dict[str, Region]]:
    """forward(input_ids, attention_mask, position_ids, logits_to_keep, cache) -> logits.

    The outlined regions come back by name, running operator by operator until they are loaded.
    """
    lowered = program.copy()
    graph = lowered.graph
    placeholders = graph.find_nodes(op="placeholder")
    for first, second in pairwise(placeholders):
        first.append(second)
    roles = list(zip(placeholders, program.inputs, strict=True))
    past = [node for node, spec in roles if spec.role == "cache"]
    states = [node for node, spec in roles if spec.role == "state"]
    with graph.inserting_after(placeholders[-1]):
        cache = graph.placeholder("cache")
    if states:
        _lower_states(graph, cache, placeholders[0], states)
    output = graph.output_node()
    output.args = (output.args[0][0],)  # type: ignore[index]
    graph.eliminate_dead_code()
    with graph.inserting_after(cache):
        length = graph.call_function(_length, (cache,))
    slots = {node: divmod(i, 2) for i, node in enumerate(past)}
    owned = set()
    for node in graph.find_nodes(op="call_function", target=regraft.cached_attention.default):
        owned.update(node.args[3:5])
        _lower_attention(graph, node, cache, slots[node.args[3]][0])
    for node in graph.find_nodes(op="call_function", target=regraft.kv_update.default):
        past_state, new = node.args
        node.target = _joined if past_state in owned else _update
        node.args = (cache, *slots[past_state], new)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        if node.args[0] in past and node.args[1] == 2:
            node.replace_all_uses_with(length)
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=regraft.causal_mask.default):
        if all(_is_causal(user) for user in node.users):
            node.target = _mask
    take_linear(graph)
    regions = _lower_regions(lowered.graph_module, placeholders[0])
    graph.eliminate_dead_code()
    for node in past:
        if node.users:
            user = next(iter(node.users))
            raise RegraftError(f"{node.name} is read by {user.name} outside attention")
        graph.erase_node(node)
    graph.lint()
    lowered.graph_module.recompile()
    return lowered.graph_module, regions


def lower_stateless(program: Program) -> tuple[fx.GraphModule, dict[str, Region]]:
    """The program as it is: its inputs -> its outputs; and its outlined regions by name."""
    lowered = program.copy()
    take_linear(lowered.graph)
    placeholders = lowered.graph.find_nodes(op="placeholder")
    regions = _lower_regions(lowered.graph_module, placeholders[0]) if placeholders else {}
    lowered.graph.lint()
    lowered.graph_module.recompile()
    return lowered.graph_module, regions


def _lower_regions(module: fx.GraphModule, ids: fx.Node) -> dict[str, Region]:
    regions: dict[str, Region] = {}
    calls = module.graph.find_nodes(op="call_module")
    if calls:
        with module.graph.inserting_after(ids):
            decode = module.graph.call_function(is_decode, (ids,))
    for node in calls:
        name = str(node.target)
        if name not in regions:
            operators = copy.deepcopy(submodule(module, name))
            take_linear(operators.graph)
            operators.recompile()
            regions[name] = Region(operators)
            module.add_submodule(name, regions[name])
        node.args = (decode, *node.args)
    return regions


def take_linear(graph: fx.Graph) -> None:
    """Run linear layers of few rows at the speed of memory."""
    for node in graph.find_nodes(op="call_function", target=regraft.packed_linear.default):
        node.target = regraft.packed_direct.default
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        weight: Any = node.args[1].meta.get("val")
        if torch.is_tensor(weight) and _has_kernel(weight):
            bias = node.args[2] if len(node.args) > 2 else None
            name = str(weight.dtype).removeprefix("torch.")
            node.args = (*node.args[:2], bias, name, int(weight.shape[0]))
            node.target = regraft.packed_linear.default
        else:
            node.target = linear


def _is_causal(node: fx.Node) -> bool:
    """Whether it is attention that without a mask sees what a causal one lets it."""
    if node.target is regraft.attention.default:
        return bool(node.kwargs.get("causal", True))
    return node.target is _attend


def _has_kernel(weight: Tensor) -> bool:
    """Whether CUDA has a kernel for linear layers with this matrix."""
    plain = weight.dim() == 2 and weight.is_contiguous() and weight.shape[1] % 32 == 0
    return weight.is_cuda and weight.dtype in HALVES.values() and plain


def _lower_attention(graph: fx.Graph, node: fx.Node, cache: fx.Node, index: int) -> None:
    q, k, v, _, _, mask, cos, sin, sinks, scale, softcap, style, offset = node.args
    with graph.inserting_before(node):
        table = None
        if cos is not None:
            table = next((u for u in cos.users if u.target is _table and u.args[2] is sin), None)
        if cos is not None and table is None:
            count = sum(n.target is _table for n in graph.nodes)
            table = graph.call_function(_table, (cache, cos, sin, count))
        out = graph.call_function(
            _attend,
            (cache, index, q, k, v, table, mask, scale, softcap, sinks, style == "interleaved",
             offset),
        )  # fmt: skip
    for user in list(node.users):
        kind: Any = user.args[1]
        if kind == 0:
            user.replace_all_uses_with(out)
            graph.erase_node(user)
        else:
            user.target = _present
            user.args = (cache, index, kind - 1, out, table, style == "interleaved", offset)
    graph.erase_node(node)


def _lower_states(graph: fx.Graph, cache: fx.Node, ids: fx.Node, past: list[fx.Node]) -> None:
    """Past states are read from the cache at the start, present ones written at the end."""
    with graph.inserting_after(cache):
        read = graph.call_function(_read_states, (cache, ids))
    for index, node in reversed(list(enumerate(past))):
        with graph.inserting_after(read):
            state = graph.call_function(getitem, (read, index))
        state.meta = dict(node.meta)
        node.replace_all_uses_with(state)
        graph.erase_node(node)
    output = graph.output_node()
    results: Any = output.args[0]
    written = list(results[-len(past) :])
    with graph.inserting_before(output):
        graph.call_function(_write_states, (cache, ids, written))


def _read_states(cache: CacheState, ids: Tensor) -> list[Tensor]:
    return cache.states.read(ids.shape[0], ids.device)  # type: ignore[union-attr]


@fx.node.has_side_effect
def _write_states(cache: CacheState, ids: Tensor, states: list[Tensor]) -> None:
    cache.states.append(states, ids.shape[1])  # type: ignore[union-attr]


def _length(cache: CacheState) -> int:
    return cache.length


def _table(cache: CacheState, cos: Tensor, sin: Tensor, index: int) -> RotationTable:
    while len(cache.tables) <= index:
        cache.tables.append(RotationTable())
    cache.tables[index].append(cos, sin)
    return cache.tables[index]


def _attend(cache, index, q, k, v, table, mask, scale, softcap, sinks, interleaved, offset):
    return cache.layers[index].step(
        q, k, v, table, mask, scale, softcap, sinks, interleaved, offset
    )


def _update(cache, index, kind, new) -> Tensor:
    """All keys (kind 0) or values (kind 1) of a layer, the new ones appended."""
    return cache.layers[index].update(kind, new)


def _joined(cache, index, kind, new) -> Tensor:
    """What _update returns, before the layer's attention appends it."""
    layer = cache.layers[index]
    return torch.cat([layer.read(kind, None), new], 2) if layer.length else new


def _present(cache, index, kind, _after, table, interleaved, offset) -> Tensor:
    """What other readers see of a layer's keys (kind 0) or values (kind 1)."""
    return cache.layers[index].read(kind, table, interleaved, offset)


def _mask(padding, queries, keys, offset, window, batch) -> Tensor | None:
    """None where plain causal attention over the cache sees the same keys."""
    if (not window or keys <= window) and (padding is None or bool(padding[:, :keys].all())):
        return None
    return causal_mask(padding, queries, keys, offset, window, batch)


def new_cache(spec: CacheSpec) -> CacheState:
    states = RecurrentStates(spec.states, spec.rollback) if spec.states else None
    layers = [new_layer(state, spec.kernels) for state in spec.layers]
    return CacheState(layers, states=states)


def new_layer(state: LayerState, kernels: bool = True) -> DenseLayer | QuantizedLayer:
    if state.format == "dense":
        return DenseLayer(kernels)
    settings, tensors = dict(state.settings), state.tensors
    spread = settings["codebook"] == "rotated"
    codings = []
    for kind in ("key", "value"):
        bits = settings[f"{kind}_bits"]
        if f"{kind}_levels" in tensors:
            book = Codebook(
                tensors[f"{kind}_midpoints"],
                tensors[f"{kind}_levels"],
                float(tensors[f"{kind}_unit"]),
            )
        else:
            book = fixed("lloyd_max" if spread else settings["codebook"], bits)
        scale, zero, fisher = (tensors.get(f"{kind}_{n}") for n in ("scale", "zero", "fisher"))
        outliers = settings[f"{kind}_outliers"]
        codings.append(Coding(bits, book, outliers, scale, zero, settings["group"], fisher))
    return QuantizedLayer(*codings, settings["sink"], settings["tail"], kernels, spread)
