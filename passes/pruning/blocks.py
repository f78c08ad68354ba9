"""Attention heads and feed-forward filters of a graph, found by what is computed."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from regraft.passes.base import Context, is_call
from regraft.passes.fuse_linear import split_fused
from regraft.passes.raise_linear import RaiseLinear
from regraft.passes.regions import between
from regraft.program import Program
from regraft.program.program import source_of

aten = torch.ops.aten
regraft = torch.ops.regraft
ATTENTION = (regraft.cached_attention.default, regraft.attention.default)
MOVES = (
    aten.transpose.int, aten.permute.default, aten.view.default, aten.reshape.default,
    aten._unsafe_view.default, aten.contiguous.default, aten.clone.default, aten.unflatten.int,
)  # fmt: skip
"""Operators that only lay tensors out anew."""
FILTERS = tuple(
    overload
    for name in (
        "gelu silu relu tanh sigmoid erf pow square mul add sub div hardswish hardtanh mish "
        "leaky_relu elu softplus clamp exp neg dropout"
    ).split()
    for overload in (
        getattr(getattr(aten, name), kind)
        for kind in getattr(aten, name).overloads()
        if kind in ("default", "Tensor", "Scalar", "Tensor_Scalar", "input")
    )
)
"""Operators that treat the filters of a feed-forward layer one by one."""


@dataclass(frozen=True, eq=False)
class Block:
    """Units that can be cut: heads with the keys they share, heads within them, or filters.

    output: the linear layer that reads the units' columns, ``width`` a unit, ``parts`` heads (or
    one filter) each. inputs: the linear layers whose rows make them, and the rows of a unit.
    between: the nodes between inputs and output. residual: what the output is added to, where it
    is added to one tensor and used for nothing else. Of ``groups`` of units that follow each
    other as many are kept of each; ``shared``: the layers that stay whole for all units.
    """

    output: fx.Node
    inputs: tuple[tuple[fx.Node, int], ...]
    between: tuple[fx.Node, ...]
    units: int
    width: int
    parts: int = 1
    attention: fx.Node | None = None
    residual: fx.Node | None = None
    groups: int = 1
    shared: tuple[fx.Node, ...] = ()

    @property
    def name(self) -> str:
        return source_of(self.output)

    @property
    def kind(self) -> str:
        if self.attention is None:
            return "filters"
        return "query heads" if self.shared else "heads"

    @property
    def scalars(self) -> int:
        """How many heads or filters there are."""
        return self.units * self.parts

    @property
    def least(self) -> int:
        """The fewest units to keep: none where the block can go, but for layers of a cache."""
        cached = is_call(self.attention, regraft.cached_attention.default)
        return self.groups * (self.residual is None or cached)

    def first(self, count: int) -> Tensor:
        """So many units, as many of each group."""
        return torch.arange(self.units).view(self.groups, -1)[:, : count // self.groups].flatten()

    def cost(self, kept: int, tokens: float) -> float:
        """Multiplications of so many units, a token of a sequence of so many tokens."""
        shared = sum(n.args[1].meta["val"].numel() for n in self.shared)
        return kept * self.macs(tokens) + (shared if kept else 0)

    def macs(self, tokens: float) -> float:
        """Multiplications of a unit, a token of a sequence of so many tokens."""
        linear = sum(rows * n.args[1].meta["val"].shape[1] for n, rows in self.inputs)
        linear += self.width * self.output.args[1].meta["val"].shape[0]
        if self.attention is None:
            return float(linear)
        q, _, v = (n.meta["val"].shape[-1] for n in self.attention.args[:3])
        return linear + self.parts * (q + v) * tokens


def find(program: Program, query_heads: bool = False) -> tuple[list[Block], list[tuple[str, str]]]:
    """The blocks in graph order, and (where, why) of those that cannot be cut.

    query_heads: where heads share keys, each is a unit of its own.
    """
    blocks, skipped = [], []
    users = _tensor_users(program)
    for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        try:
            block = _heads(node, query_heads) or _filters(node)
            if block is not None:
                _refuse_shared(block, users)
                blocks.append(block)
        except _CannotCut as reason:
            skipped.append((source_of(node), str(reason)))
    return blocks, skipped


def has_query_heads(blocks: Sequence[Any]) -> bool:
    """Whether these blocks, or layouts of masks, are those of ``find(program, True)``."""
    return not any(block.kind == "heads" and block.parts > 1 for block in blocks)


def count_macs(program: Program, tokens: float) -> float:
    """Those a token of all blocks that can be cut, by the weights that the graph has now.

    The program is one captured here, not one that was loaded, and its layers are not outlined.
    """
    RaiseLinear().apply(made := program.copy(), Context())
    split_fused(made)
    return sum(block.cost(block.units, tokens) for block in find(made)[0])


class _CannotCut(Exception):
    pass


def _tensor_users(program: Program) -> dict[int, list[fx.Node]]:
    """The nodes that read each tensor, by where its memory begins."""
    found: dict[int, list[fx.Node]] = defaultdict(list)
    for node in program.graph.find_nodes(op="get_attr"):
        value = getattr(program.graph_module, str(node.target), None)
        if torch.is_tensor(value):
            node.meta["begins"] = value.data_ptr()
            found[value.data_ptr()] += node.users
    return found


def _refuse_shared(block: Block, users: dict[int, list[fx.Node]]) -> None:
    for node in (block.output, *(n for n, _ in block.inputs)):
        for constant in node.args[1:]:
            if constant is None:
                continue
            if constant.op != "get_attr":
                raise _CannotCut("its weights are computed")
            others = [user for user in users[constant.meta["begins"]] if user is not node]
            if others:
                raise _CannotCut(
                    f"its weight {constant.target} is shared with {source_of(others[0])}: give "
                    "each layer weights of its own"
                )


def _heads(output: fx.Node, query_heads: bool) -> Block | None:
    node: Any = output.args[0]
    after = []
    while isinstance(node, fx.Node) and node.target in MOVES:
        after.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return None
    attention: Any = node
    if is_call(node, getitem) and is_call(node.args[0], ATTENTION[0]) and node.args[1] == 0:
        attention = node.args[0]
        after.append(node)
    if attention.op != "call_function" or attention.target not in ATTENTION:
        return None
    _check_attention(attention)
    q, k, v = (n.meta["val"].shape for n in attention.args[:3])
    if not all(isinstance(n, int) for shape in (q, k, v) for n in (shape[1], shape[3])):
        raise _CannotCut("its number of heads is not constant")
    units, parts = k[1], q[1] // k[1]
    inputs, paths = [], []
    for kind, argument, shape in zip("qkv", attention.args[:3], (q, k, v), strict=True):
        linear, path = _origin(argument, kind, attention)
        rows = shape[1] * shape[3]
        if linear.args[1].meta["val"].shape[0] != rows:
            raise _CannotCut(f"its {kind} come from a layer of other width")
        if shape[1] > 1 and any(_mixes(node, rows) for node in path):
            raise _CannotCut(f"its {kind} are normalised over all heads")
        inputs.append((linear, rows // units))
        paths.append(path)
    if len({linear for linear, _ in inputs}) < 3:
        raise _CannotCut("its keys, values or queries come from one layer")
    ends = [attention, *reversed(after)]
    if parts > 1 and (query_heads or units == 1):
        _check_users([*paths[0], *ends], output)
        query, *shared = (linear for linear, _ in inputs)
        return Block(
            output, ((query, q[3]),), (*paths[0], *ends), q[1], v[3], 1, attention,
            _residual(output), units, tuple(shared),
        )  # fmt: skip
    nodes = [*itertools.chain(*paths), *ends]
    _check_users(nodes, output)
    return Block(
        output, tuple(inputs), tuple(nodes), units, parts * v[3], parts, attention,
        _residual(output),
    )  # fmt: skip


def _mixes(node: fx.Node, rows: int) -> bool:
    """Whether a node computes with all of a layer's outputs together, or with a weight each."""
    tensors = [n.meta["val"] for n in node.all_input_nodes if torch.is_tensor(n.meta.get("val"))]
    whole = [x for x in tensors if x.shape[-1:] == (rows,)]
    alone = len(whole) == 1 and all(x.numel() == 1 for x in tensors if x is not whole[0])
    return bool(whole) and node.target not in MOVES and not (node.target in FILTERS and alone)


def _check_attention(node: fx.Node) -> None:
    arguments: tuple[Any, ...] = node.args
    cached = node.target is ATTENTION[0]
    mask, sinks = (arguments[5], arguments[8]) if cached else arguments[3:5]
    if sinks is not None:
        raise _CannotCut("its heads have attention sinks")
    if mask is not None and mask.meta["val"].dim() == 4 and mask.meta["val"].shape[1] != 1:
        raise _CannotCut("its mask differs from head to head")
    for item in node.users if cached else ():
        if item.args[1] != 0 and any(user.op != "output" for user in item.users):
            raise _CannotCut("another layer reads its keys or values")


def _origin(node: fx.Node, kind: str, attention: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The linear layer that q, k or v come from, and the nodes between, in graph order."""
    linears: set[fx.Node] = set()
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if is_call(current, aten.linear.default):
            linears.add(current)
        elif current.op == "call_function" and current.target not in ATTENTION:
            for source in current.all_input_nodes:
                if source not in seen and torch.is_tensor(source.meta.get("val")):
                    seen.add(source)
                    stack.append(source)
    if len(linears) != 1:
        raise _CannotCut(f"its {kind} do not come from one linear layer")
    return linears.copy().pop(), between(attention.graph, linears, [node])


def _filters(output: fx.Node) -> Block | None:
    x: Any = output.args[0]
    shape = x.meta["val"].shape
    if x.op != "call_function" or x.target not in FILTERS:
        return None
    residual = _residual(output)
    inputs: list[fx.Node] = []
    inner: set[fx.Node] = set()
    stack = [x]
    while stack:
        node = stack.pop()
        if is_call(node, aten.linear.default):
            if node not in inputs:
                inputs.append(node)
        elif node not in inner:
            if node.op != "call_function" or node.target not in FILTERS:
                return None
            inner.add(node)
            tensors = [n for n in node.all_input_nodes if torch.is_tensor(n.meta.get("val"))]
            if any(n.meta["val"].shape[-1:] != shape[-1:] for n in tensors):
                return None
            stack += tensors
    if not inputs or residual is None:
        return None
    ordered = tuple(n for n in output.graph.nodes if n in inner)
    _check_users([*inputs, *ordered], output)
    return Block(
        output, tuple((n, 1) for n in inputs), ordered, int(shape[-1]), 1, residual=residual
    )  # fmt: skip


def _check_users(nodes: list[fx.Node], output: fx.Node) -> None:
    inside = {*nodes, output}
    for node in nodes:
        for user in _readers(node):
            if user not in inside:
                raise _CannotCut(f"its {node.name} is read by {source_of(user)} as well")


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Users of a node but the outputs of the graph, by way of ``getitem`` of a cache."""
    for user in node.users:
        if user.op != "output" and not (is_call(user, getitem) and user.args[1] != 0):
            yield user


def _residual(output: fx.Node) -> fx.Node | None:
    users = list(output.users)
    if len(users) != 1 or not is_call(users[0], aten.add.Tensor) or users[0].kwargs:
        return None
    others = [n for n in users[0].args if n is not output]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    shapes = (n.meta["val"].shape for n in (others[0], output))
    return others[0] if len({str(shape) for shape in shapes}) == 1 else None
