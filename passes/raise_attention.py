"""Each attention layer becomes one node that owns its cache and its rotation.

A rotation is recognised by what it computes, not by how it is spelled: the operators between
the key and the tensor that dominates it are run on unit vectors, and the resulting matrices
must be rotations of channel pairs by angles that depend on the position alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from regraft.passes.base import Context, Pass, PassResult, is_call
from regraft.program import Program
from regraft.program.program import source_of

aten = torch.ops.aten
regraft = torch.ops.regraft
STOPS = (aten.linear.default, aten.mm.default, aten.addmm.default, aten.matmul.default,
         aten.embedding.default, aten.bmm.default, regraft.attention.default,
         regraft.cached_attention.default, aten.convolution.default)  # fmt: skip


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """attention(R q, [past_k; R k], [past_v; v]) -> cached_attention(q, k, v, past, cos, sin)

    Exact. R is the rotary embedding; where none is recognised, q and k stay as they are and the
    result says why.
    """

    def apply(self, program: Program, context: Context) -> PassResult:
        matches, skipped = 0, []
        finder = _RotationFinder(program)
        for node in program.graph.find_nodes(op="call_function", target=regraft.attention.default):
            q, key, value, mask, sinks, scale, softcap = node.args
            (key, tiles), (value, value_tiles) = _untiled(key), _untiled(value)
            if tiles != value_tiles:
                skipped.append((source_of(node), "its keys and values repeat differently"))
                continue
            if not is_call(key, regraft.kv_update.default):
                skipped.append((source_of(node), "its keys do not come from its own cache"))
                continue
            if not is_call(value, regraft.kv_update.default):
                skipped.append((source_of(node), "its values do not come from its own cache"))
                continue
            k, v = key.args[1], value.args[1]
            rotation, reason = finder.find(q, k)
            if rotation is None:
                skipped.append((f"{source_of(node)} rotation", reason))
            cos, sin, style, offset = None, None, "half", 0
            if rotation is not None:
                q, k = rotation.q, rotation.k
                cos, sin, style, offset = finder.tables(rotation)
            with program.graph.inserting_before(node):
                if tiles > 1:
                    q = _swap_head_groups(program.graph, q, tiles)
                    for tiled in node.args[1:3]:
                        node.replace_input_with(tiled, tiled.args[0])
                        if not tiled.users:
                            program.graph.erase_node(tiled)
                raised = program.graph.call_function(
                    regraft.cached_attention.default,
                    (q, k, v, key.args[0], value.args[0], mask, cos, sin, sinks, scale, softcap,
                     style, offset),
                )  # fmt: skip
                raised.meta = {**node.meta}
                raised.meta["val"] = (node.meta["val"], key.meta["val"], value.meta["val"])
                for index, old in enumerate((node, key, value)):
                    item = program.graph.call_function(getitem, (raised, index))
                    item.meta = dict(old.meta)
                    if index == 0 and tiles > 1:
                        item = _swap_head_groups(program.graph, item, k.meta["val"].shape[1])
                    old.replace_all_uses_with(item, lambda user, new=raised: user is not new)
            matches += 1
        return PassResult(matches, tuple(skipped))


def _untiled(node: fx.Node) -> tuple[fx.Node, int]:
    """The cached heads, and how often they are tiled to one a query head."""
    if is_call(node, aten.repeat.default) and is_call(node.args[0], regraft.kv_update.default):
        batch, tiles, *rest = node.args[1]
        if [batch, *rest] == [1, 1, 1] and isinstance(tiles, int):
            return node.args[0], tiles
    return node, 1


def _swap_head_groups(graph: fx.Graph, node: fx.Node, groups: int) -> fx.Node:
    """Head g * n + i of groups * n heads [batch, heads, length, size] to head i * groups + g."""
    value = node.meta["val"]
    for target, args in (
        (aten.unflatten.int, (1, [groups, int(value.shape[1]) // groups])),
        (aten.transpose.int, (1, 2)),
        (aten.flatten.using_ints, (1, 2)),
    ):
        node = graph.call_function(target, (node, *args))
    node.meta["val"] = value
    return node


@dataclass
class _Rotation:
    q: fx.Node
    k: fx.Node
    cos: Tensor
    sin: Tensor
    style: str
    offset: int
    positional: tuple[fx.Node, ...]


@dataclass
class _RotationFinder:
    program: Program
    values: dict[fx.Node, object] = field(default_factory=dict)
    made: dict[tuple, tuple] = field(default_factory=dict)
    known: dict[tuple, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        placeholders = self.program.graph.find_nodes(op="placeholder")
        self.positional, data = set(), set()
        for node, spec, example in zip(
            placeholders, self.program.inputs, self.program.examples, strict=True
        ):
            self.values[node] = example
            (self.positional if spec.role == "positions" else data).add(node)
        for node in self.program.graph.nodes:
            tensors = [n for n in node.all_input_nodes if torch.is_tensor(n.meta.get("val"))]
            if any(n in data for n in tensors):
                if torch.is_tensor(node.meta.get("val")) or node.target in STOPS:
                    data.add(node)
            elif any(n in self.positional for n in tensors):
                self.positional.add(node)

    def find(self, q: fx.Node, k: fx.Node) -> tuple[_Rotation | None, str]:
        found: list[Any] = []
        for node in (k, q):
            region = self._region(node)
            if isinstance(region, str):
                return None, region
            source, inner, positional = region
            key = _structure(node, source, inner)
            if key not in self.known:
                self.known[key] = self._measure(node, source, inner)
            if self.known[key] is None:
                return None, "what happens to the keys between projection and cache is no rotation"
            found.append((source, self.known[key], positional))
        (k_source, k_kind, positional), (q_source, q_kind, _) = found
        turned = zip(k_kind[:2], q_kind[:2], strict=True)
        if k_kind[2:] != q_kind[2:] or not all(torch.equal(a, b) for a, b in turned):
            return None, "queries and keys are rotated differently"
        cos, sin, style, offset = k_kind
        rotation = _Rotation(q_source, k_source, cos, sin, style, offset, positional)
        if self.tables(rotation)[0] is None:
            return None, "no tensor of the graph holds the cosines and sines"
        return rotation, ""

    def _region(self, end: fx.Node):
        """(dominating tensor before positions mix in, nodes after it, positional operands)."""
        cone, stack = set(), [end]
        while stack:
            node = stack.pop()
            if node in cone or node in self.positional or node.target in STOPS:
                continue
            if not torch.is_tensor(node.meta.get("val")) or node.op in ("get_attr", "placeholder"):
                continue
            cone.add(node)
            stack.extend(node.all_input_nodes)
        mixing = {n for n in cone if any(a in self.positional for a in n.all_input_nodes)}
        if not mixing:
            return "positions do not enter the keys after the projection"
        order = {node: i for i, node in enumerate(self.program.graph.nodes)}
        after = set(mixing)
        for node in sorted(cone, key=order.__getitem__):
            if any(a in after for a in node.all_input_nodes):
                after.add(node)
        shape = end.meta["val"].shape
        for source in sorted(cone - after, key=order.__getitem__, reverse=True):
            value = source.meta["val"]
            if value.dim() != 4 or value.shape[-1] != shape[-1] or value.shape[1] != shape[1]:
                continue
            inner = self._between(source, end, cone)
            if inner is not None:
                used = {a for n in inner for a in n.all_input_nodes if a in self.positional}
                tensors = tuple(
                    sorted(
                        (a for a in used if torch.is_tensor(a.meta.get("val"))),
                        key=order.__getitem__,
                    )
                )
                return source, sorted(inner, key=order.__getitem__), tensors
        return "no single tensor holds the keys before rotation"

    def _between(self, source, end, cone):
        inner, stack = set(), [end]
        while stack:
            node = stack.pop()
            if node is source or node in inner:
                continue
            if node.target in STOPS:
                return None
            if node not in cone:
                continue
            inner.add(node)
            stack.extend(node.all_input_nodes)
        reached = {a for n in inner for a in n.all_input_nodes}
        frontier = {a for a in reached if a in cone} - inner - {source}
        outside = {a for a in reached if a.target in STOPS}
        return None if frontier or outside else inner

    def _value(self, node: fx.Node) -> Any:
        if node not in self.values:
            with torch.no_grad():
                self.values[node] = self._run(node, self._value)
        return self.values[node]

    def _run(self, node: fx.Node, lookup: Any) -> Any:
        if node.op == "get_attr":
            return getattr(self.program.graph_module, str(node.target))
        args = fx.map_arg(node.args, lookup)
        target: Any = node.target
        return target(*args, **fx.map_arg(node.kwargs, lookup))

    def _measure(self, end, source, inner):
        batch, heads, _, size = source.meta["val"].shape
        length = self.program.examples[0].shape[1]
        rows = self.program.examples[0].shape[0]
        example = torch.zeros(rows, int(heads), length, int(size))
        device, dtype = source.meta["val"].device, source.meta["val"].dtype
        columns = []
        for channel in range(int(size)):
            unit = example.clone()
            unit[..., channel] = 1.0
            env = {source: unit.to(device, dtype)}
            for node in inner:
                env[node] = self._run(
                    node, lambda n, env=env: env[n] if n in env else self._value(n)
                )
            columns.append(env[end][:, 0].float())
        return _as_rotation(torch.stack(columns, -1))

    def tables(self, rotation: _Rotation):
        """Graph nodes for cos and sin [batch, length, pairs], made once for all layers."""
        key = (rotation.positional, rotation.style, rotation.offset)
        if key not in self.made:
            pairs = rotation.cos.shape[-1]
            cos = self._table(rotation, rotation.cos, pairs)
            sin = self._table(rotation, rotation.sin, pairs)
            self.made[key] = (cos, sin) if cos is not None and sin is not None else (None, None)
        return (*self.made[key], rotation.style, rotation.offset)

    def _table(self, rotation: _Rotation, wanted: Tensor, pairs: int) -> fx.Node | None:
        for node in rotation.positional:
            value = self._value(node)
            parts = (value.real, value.imag) if value.is_complex() else (value,)
            for index, tensor in enumerate(parts):
                for squeeze in _singletons(tensor):
                    flat = tensor.squeeze(squeeze) if squeeze else tensor
                    for step in (None, 1, 2):
                        view = flat if step is None else flat[..., ::step][..., :pairs]
                        if view.shape == wanted.shape and torch.allclose(view.float(), wanted):
                            part = index if value.is_complex() else None
                            return self._emit(node, part, squeeze, step, pairs)
        return None

    def _emit(self, node, complex_part, squeeze, step, pairs) -> fx.Node:
        graph = self.program.graph
        with graph.inserting_after(node):
            anchor = node

            def call(target, *args):
                nonlocal anchor
                with graph.inserting_after(anchor):
                    anchor = graph.call_function(target, (anchor, *args))
                return anchor

            if complex_part is not None:
                call(aten.view_as_real.default)
                call(aten.select.int, -1, complex_part)
            if squeeze:
                call(aten.squeeze.dims, list(squeeze))
            if step == 2:
                call(aten.slice.Tensor, -1, 0, 2 * pairs, 2)
            elif step == 1:
                call(aten.slice.Tensor, -1, 0, pairs)
        return anchor


def _singletons(tensor: Tensor):
    yield ()
    for dim in range(1, tensor.dim() - 1):
        if tensor.shape[dim] == 1:
            yield (dim,)


def _structure(end: fx.Node, source: fx.Node, inner: list[fx.Node]) -> tuple:
    """Equal for two regions that compute the same function of their source."""
    names = {node: f"%{i}" for i, node in enumerate(inner)} | {source: "%source"}

    def text(argument) -> str:
        if isinstance(argument, fx.Node):
            return names.get(argument, argument.name)
        if isinstance(argument, (list, tuple)):
            return str([text(a) for a in argument])
        return repr(argument)

    shape = tuple(str(s) for s in source.meta["val"].shape[1::2])
    return (shape, names[end], *(f"{n.target}{text(n.args)}{n.kwargs}" for n in inner))


def _as_rotation(matrix: Tensor) -> tuple[Tensor, Tensor, str, int] | None:
    """cos, sin [batch, length, pairs], style and first channel of matrices [..., D, D]."""
    size = matrix.shape[-1]
    moved = (matrix != torch.eye(size)).flatten(0, 1).any(0)
    channels = (moved.any(0) | moved.any(1)).nonzero().flatten()
    if len(channels) == 0 or len(channels) % 2:
        return None
    offset, width = int(channels[0]), len(channels)
    if int(channels[-1]) - offset + 1 != width:
        return None
    half = torch.arange(width // 2) + offset
    styles = {"half": (half, half + width // 2)}
    styles["interleaved"] = (offset + 2 * torch.arange(width // 2),) * 2
    styles["interleaved"] = (styles["interleaved"][0], styles["interleaved"][0] + 1)
    for style, (a, b) in styles.items():
        cos, sin = matrix[..., a, a], matrix[..., b, a]
        built = torch.eye(size).expand_as(matrix).clone()
        built[..., a, a], built[..., b, b] = cos, cos
        built[..., b, a], built[..., a, b] = sin, -sin
        if torch.allclose(built, matrix, atol=1e-6):
            return cos, sin, style, offset
    return None
