"""Rotary embeddings, recognised by what they compute.

The operators between a key and the tensor that dominates it are run on unit vectors; the
resulting matrices must be rotations of channel pairs by angles that depend on the position alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from regraft.passes.regions import call
from regraft.program import Program

aten = torch.ops.aten
regraft = torch.ops.regraft
STOPS = (aten.linear.default, aten.mm.default, aten.addmm.default, aten.matmul.default,
         aten.embedding.default, aten.bmm.default, aten.einsum.default,
         aten.convolution.default, regraft.attention.default,
         regraft.cached_attention.default)  # fmt: skip
COUNTS = (aten.arange.default, aten.arange.start, aten.arange.start_step)


@dataclass
class Rotation:
    q: fx.Node
    k: fx.Node
    cos: Tensor
    sin: Tensor
    style: str
    offset: int
    deinterleaved: bool
    positional: tuple[fx.Node, ...]
    part: tuple[int, int] = (0, 0)
    wholes: tuple[fx.Node, ...] = ()


@dataclass
class RotationFinder:
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
            (self.positional if spec.role in ("positions", "mask") else data).add(node)
        for node in self.program.graph.nodes:
            tensors = [n for n in node.all_input_nodes if _holds_tensors(n)]
            if any(n in data for n in tensors):
                if _holds_tensors(node) or node.target in STOPS:
                    data.add(node)
            elif node.target in COUNTS or any(n in self.positional for n in tensors):
                self.positional.add(node)

    def find(self, q: fx.Node, k: fx.Node) -> tuple[Rotation | None, str]:
        """The rotation that ends in q and k [batch, heads, length, size], or why there is none.

        Where no tensor of their size precedes it, it may act on one part of a concatenation.
        """
        rotation, reason = self._find(q, k)
        if rotation is not None:
            return rotation, ""
        parts = [self._turned_part(node) for node in (k, q)]
        if None in parts or parts[0][:2] != parts[1][:2]:
            return None, reason
        index, start, k_part = parts[0]
        rotation, reason = self._find(parts[1][2], k_part)
        if rotation is not None:
            rotation.part, rotation.wholes = (index, start), (q, k)
        return rotation, reason

    def _turned_part(self, node: Any) -> Any:
        """Index, first channel and node of the one part that positions turn."""
        if node.target != aten.cat.default or node.args[1] not in (-1, 3):
            return None
        found, start = [], 0
        for index, part in enumerate(node.args[0]):
            if self._cone(part)[1]:
                found.append((index, start, part))
            start += int(part.meta["val"].shape[-1])
        return found[0] if len(found) == 1 else None

    def _find(self, q: fx.Node, k: fx.Node) -> tuple[Rotation | None, str]:
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
        cos, sin, style, offset, deinterleaved = k_kind
        rotation = Rotation(q_source, k_source, cos, sin, style, offset, deinterleaved, positional)
        if self.tables(rotation)[0] is None:
            return None, "no tensor of the graph holds the cosines and sines"
        return rotation, ""

    def _cone(self, end: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
        """What a node is computed from since the last product, and where positions mix in."""
        cone, stack = set(), [end]
        while stack:
            node = stack.pop()
            if node in cone or node in self.positional or node.target in STOPS:
                continue
            if not _holds_tensors(node) or node.op in ("get_attr", "placeholder"):
                continue
            cone.add(node)
            stack.extend(node.all_input_nodes)
        return cone, {n for n in cone if any(a in self.positional for a in n.all_input_nodes)}

    def _region(self, end: fx.Node):
        """(dominating tensor before positions mix in, nodes after it, positional operands)."""
        cone, mixing = self._cone(end)
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
            if not torch.is_tensor(value) or value.dim() != 4 or value.shape[-1] != shape[-1]:
                continue
            if value.shape[2 if _swapped(source) else 1] != shape[1]:
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
        heads, size = (int(n) for n in end.meta["val"].shape[1::2])
        rows, length = self.program.examples[0].shape
        example = torch.zeros(rows, heads, length, size)
        device, dtype = source.meta["val"].device, source.meta["val"].dtype
        columns = []
        for channel in range(size):
            unit = example.clone()
            unit[..., channel] = 1.0
            unit = unit.transpose(1, 2) if _swapped(source) else unit
            env = {source: unit.to(device, dtype)}
            for node in inner:
                env[node] = self._run(
                    node, lambda n, env=env: env[n] if n in env else self._value(n)
                )
            columns.append(env[end][:, 0].float())
        return as_rotation(torch.stack(columns, -1).cpu())

    def unrotated(self, rotation: Rotation) -> list[fx.Node]:
        """Queries and keys before rotation [batch, heads, length, size], made where they are
        not in the graph."""
        graph, found = self.program.graph, []
        for i, node in enumerate((rotation.q, rotation.k)):
            if _swapped(node):
                node = call(graph, aten.transpose.int, node, 1, 2)
            if rotation.deinterleaved:
                size, begin = int(node.meta["val"].shape[-1]), rotation.offset
                end = begin + 2 * rotation.cos.shape[-1]
                ranges = [(0, begin, 1), (begin, end, 2), (begin + 1, end, 2), (end, size, 1)]
                pieces = [
                    call(graph, aten.slice.Tensor, node, -1, *piece)
                    for piece in ranges
                    if piece[0] < piece[1]
                ]
                node = call(graph, aten.cat.default, pieces, -1)
            if rotation.wholes:
                pieces = list(rotation.wholes[i].args[0])  # type: ignore[arg-type]
                pieces[rotation.part[0]] = node
                node = call(graph, aten.cat.default, pieces, -1)
            found.append(node)
        return found

    def tables(self, rotation: Rotation):
        """Graph nodes for cos and sin [batch or 1, length, pairs], made once for all layers."""
        key = (rotation.positional, rotation.style, rotation.offset)
        if key not in self.made:
            pairs = rotation.cos.shape[-1]
            cos = self._table(rotation, rotation.cos, pairs)
            sin = self._table(rotation, rotation.sin, pairs)
            self.made[key] = (cos, sin) if cos is not None and sin is not None else (None, None)
        return (*self.made[key], rotation.style, rotation.part[1] + rotation.offset)

    def _table(self, rotation: Rotation, wanted: Tensor, pairs: int) -> fx.Node | None:
        for node in rotation.positional:
            value = self._value(node)
            parts = (value.real, value.imag) if value.is_complex() else (value,)
            for index, tensor in enumerate(parts):
                for squeeze in _singletons(tensor):
                    flat = tensor.squeeze(squeeze) if squeeze else tensor
                    for step in (None, 1, 2):
                        view = flat if step is None else flat[..., ::step][..., :pairs]
                        if len(view) not in (1, len(wanted)) or view.shape[1:] != wanted.shape[1:]:
                            continue
                        if torch.allclose(view.float().cpu().expand_as(wanted), wanted):
                            part = index if value.is_complex() else None
                            return self._emit(node, part, squeeze, step, pairs)
        return None

    def _emit(self, node, complex_part, squeeze, step, pairs) -> fx.Node:
        graph = self.program.graph
        with graph.inserting_after(node):
            anchor = node

            def then(target, *args):
                nonlocal anchor
                with graph.inserting_after(anchor):
                    anchor = call(graph, target, anchor, *args)

            if complex_part is not None:
                then(aten.view_as_real.default)
                then(aten.select.int, -1, complex_part)
            if squeeze:
                then(aten.squeeze.dims, list(squeeze))
            if step == 2:
                then(aten.slice.Tensor, -1, 0, 2 * pairs, 2)
            elif step == 1:
                then(aten.slice.Tensor, -1, 0, pairs)
        return anchor


def _holds_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return torch.is_tensor(value) or isinstance(value, (list, tuple))


def _swapped(node: fx.Node) -> bool:
    """Whether a tensor is [batch, length, heads, size], not [batch, heads, length, size]."""
    return isinstance(node.meta["val"].shape[1], torch.SymInt)


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


def as_rotation(matrix: Tensor) -> tuple[Tensor, Tensor, str, int, bool] | None:
    """cos, sin [batch, length, pairs], style and first channel of matrices [..., D, D], and
    whether the channels go from interleaved to halves before they are rotated."""
    size = matrix.shape[-1]
    moved = (matrix != torch.eye(size)).flatten(0, 1).any(0)
    channels = (moved.any(0) | moved.any(1)).nonzero().flatten()
    if len(channels) == 0:
        return None
    offset, width = int(channels[0]), int(channels[-1] - channels[0]) + 1
    if width % 2 or len(channels) != width:
        return None
    half = torch.arange(width // 2)
    order = torch.arange(size)
    order[offset : offset + width] = offset + torch.cat([2 * half, 2 * half + 1])
    kinds = {
        ("half", False): (half, half + width // 2),
        ("interleaved", False): (2 * half, 2 * half + 1),
        ("half", True): (half, half + width // 2),
    }
    for (style, deinterleaved), (a, b) in kinds.items():
        a, b = a + offset, b + offset
        turned = matrix[..., order] if deinterleaved else matrix
        cos, sin = turned[..., a, a], turned[..., b, a]
        built = torch.eye(size).expand_as(matrix).clone()
        built[..., a, a], built[..., b, b] = cos, cos
        built[..., b, a], built[..., a, b] = sin, -sin
        if torch.allclose(built, turned, atol=1e-6):
            return cos, sin, style, offset, deinterleaved
    return None
