"""A functional program to one that keeps its state: past and present become a cache object."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx

from regraft.kernels.linear.reference import linear
from regraft.kernels.ops import causal_mask
from regraft.program import LayerState, Program, RegraftError
from regraft.program.program import source_of
from regraft.runtime.cache import CacheState, DenseLayer, QuantizedLayer, RotationTable
from regraft.runtime.regions import Region, variant_of

regraft = torch.ops.regraft


def lower(program: Program) -> tuple[fx.GraphModule, dict[str, Region]]:
    """forward(input_ids, attention_mask, position_ids, logits_to_keep, cache) -> logits.

    The outlined regions come back by name, running operator by operator until they are loaded.
    """
    lowered = program.copy()
    graph = lowered.graph
    left = [
        node
        for node in graph.find_nodes(op="call_function", target=regraft.attention.default)
        if node.args[1].target == regraft.kv_update.default
    ]
    if left:
        raise RegraftError(
            f"attention at {source_of(left[0])} was not raised, so its cache cannot be kept in "
            "place; the report of RaiseAttention says why"
        )
    placeholders = graph.find_nodes(op="placeholder")
    past = placeholders[len(placeholders) - 2 * len(program.cache.layers) :]
    with graph.inserting_after(placeholders[-1]):
        cache = graph.placeholder("cache")
    with graph.inserting_after(cache):
        length = graph.call_function(_length, (cache,))
    raised = graph.find_nodes(op="call_function", target=regraft.cached_attention.default)
    for index, node in enumerate(raised):
        _lower_attention(graph, node, cache, index)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        if node.args[0] in past and node.args[1] == 2:
            node.replace_all_uses_with(length)
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=regraft.causal_mask.default):
        if all(user.target is _attend for user in node.users):
            node.target = _mask
    take_linear(graph)
    regions = _lower_regions(lowered.graph_module, placeholders[0])
    output = graph.output_node()
    output.args = (output.args[0][0],)  # type: ignore[index]
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
            variant = module.graph.call_function(variant_of, (ids,))
    for node in calls:
        name = str(node.target)
        if name not in regions:
            operators = copy.deepcopy(module.get_submodule(name))
            take_linear(operators.graph)
            operators.recompile()
            regions[name] = Region(operators)
            module.add_submodule(name, regions[name])
        node.args = (variant, *node.args)
    return regions


def take_linear(graph: fx.Graph) -> None:
    """Run linear layers of few rows at the speed of memory."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        node.target = linear


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
        if user.args[1] == 0:
            user.replace_all_uses_with(out)
        else:
            user.replace_all_uses_with(None)  # type: ignore[arg-type]
        graph.erase_node(user)
    graph.erase_node(node)


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


def _mask(padding, queries, keys, offset, window, batch) -> Tensor | None:
    """None where plain causal attention over the cache sees the same keys."""
    if (not window or keys <= window) and (padding is None or bool(padding[:, :keys].all())):
        return None
    return causal_mask(padding, queries, keys, offset, window, batch)


def new_cache(layers: tuple[LayerState, ...]) -> CacheState:
    return CacheState([_layer(state) for state in layers])


def _layer(state: LayerState) -> DenseLayer | QuantizedLayer:
    return DenseLayer() if state.format == "dense" else QuantizedLayer(**dict(state.settings))
