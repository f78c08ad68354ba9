"""Linear layers whose inputs can be divided by scales, and what comes before that takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn

from regraft.passes.base import is_call
from regraft.program import Program

aten = torch.ops.aten
_NORMS = {aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2,)}
"""Where a normalisation has its factors and what is added to them."""
_SPLITS = (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default)
_SAME = (
    aten.index.Tensor, aten.type_as.default, aten._to_copy.default, aten.to.dtype,
    aten.contiguous.default, aten.clone.default, aten.view.default, aten.reshape.default,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Site:
    """Layers that read one tensor, and what comes before it: ``source``, and which of its arguments
    are factors, or a linear layer ``before`` and the first of its rows."""

    linears: list[fx.Node]
    source: fx.Node
    places: tuple[int, ...] = ()
    before: fx.Node | None = None
    start: int = 0


def find(program: Program, linears: Sequence[fx.Node]) -> tuple[list[Site], list[fx.Node]]:
    """The places where scales can be folded, and the layers that have none."""
    owners = [id(weight_of(program, node)) for node in linears]
    groups: dict[fx.Node, list[fx.Node]] = {}
    others, sites = [], []
    for node, owner in zip(linears, owners, strict=True):
        if owners.count(owner) == 1:
            groups.setdefault(_source(node.args[0]), []).append(node)
        else:
            others.append(node)
    alone = {node for group in groups.values() for node in group}
    for source, group in groups.items():
        site = _site(program, source, group, alone)
        if site is None:
            others += group
        else:
            sites.append(site)
    return sites, others


def fold(program: Program, site: Site, scale: Tensor) -> Tensor | None:
    """Let what comes before a site's layers give their input divided by scale [channels]: its
    factors and bias now, or by its rows' factors [out] that come back."""
    if site.before is None:
        arguments = list(site.source.args)
        for place in site.places:
            value = _constant(program, arguments[place])
            assert value is not None
            arguments[place] = _put(program, site, place, value / scale, arguments[place])
        site.source.args = tuple(arguments)
        return None
    rows = scale.new_ones(int(site.before.meta["val"].shape[-1]))
    rows[site.start : site.start + len(scale)] /= scale
    if len(site.before.args) > 2 and site.before.args[2] is not None:
        x, weight, bias = site.before.args
        value = _constant(program, bias)
        assert value is not None
        site.before.args = (x, weight, _put(program, site, 2, value * rows, bias))
    return rows


def weight_of(program: Program, linear: fx.Node) -> Tensor:
    return getattr(program.graph_module, str(linear.args[1].target))  # type: ignore[union-attr]


def _put(program: Program, site: Site, place: int, value: Tensor, old: Any) -> fx.Node:
    """A node that reads a new constant in the place of an old one."""
    name = f"{site.linears[0].args[1].target}_input_{place}"  # type: ignore[union-attr]
    made = nn.Parameter(value.to(old.meta["val"].dtype), requires_grad=False)
    program.graph_module.register_parameter(name, made)
    with program.graph.inserting_before(site.before or site.source):
        node = program.graph.get_attr(name)
    node.meta = {**old.meta, "val": made}
    return node


def _source(x: Any) -> fx.Node:
    """Where the channels of x were made."""
    while x.target in _SAME and _same_channels(x):
        x = x.args[0]
    return x


def _same_channels(node: Any) -> bool:
    if is_call(node, aten.index.Tensor) and len(node.args[1]) >= node.meta["val"].dim():
        return False
    return node.args[0].meta["val"].shape[-1] == node.meta["val"].shape[-1]


def _site(
    program: Program, source: fx.Node, group: list[fx.Node], linears: set[fx.Node]
) -> Site | None:
    if not _read_by(source, set(group)) or source.op != "call_function":
        return None
    if source.target in _NORMS:
        places = _NORMS[source.target]
        given = [i for i in places if i < len(source.args) and source.args[i] is not None]
        known = all(_constant(program, source.args[i]) is not None for i in given)
        return Site(group, source, tuple(given)) if known and places[0] in given else None
    if is_call(source, aten.mul.Tensor):
        for place, factor in enumerate(source.args):
            if _constant(program, factor) is not None:
                return Site(group, source, (place,))
        for factor in source.args:
            linear, start = _made_by(factor)
            if linear in linears and linear not in group and _takes(program, linear):
                return Site(group, source, before=linear, start=start)
    return None


def _takes(program: Program, linear: Any) -> bool:
    """Whether rows of a layer can be scaled: it has no bias, or a constant."""
    bias = linear.args[2] if len(linear.args) > 2 else None
    return bias is None or _constant(program, bias) is not None


def _read_by(node: fx.Node, linears: set[fx.Node]) -> bool:
    """Whether nothing but these layers reads the channels of a node."""
    return all(
        user in linears and user.args[0] is node and user.args[1] is not node
        or (user.target in _SAME and user.args[0] is node and _same_channels(user)
            and user.args.count(node) == 1 and _read_by(user, linears))
        for user in node.users
    )  # fmt: skip


def _constant(program: Program, node: Any) -> Tensor | None:
    """The value [channels] of a node made of weights alone."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        value = getattr(program.graph_module, str(node.target)).detach()
        return value if value.dim() == 1 and len(value) > 1 else None
    if is_call(node, aten.add.Tensor) and isinstance(node.args[1], (int, float)):
        value = _constant(program, node.args[0])
        return None if value is None else value + node.args[1]
    return None


def _made_by(node: Any) -> tuple[Any, int]:
    """The linear layer whose outputs a node is that nothing else reads, and the first of them."""
    if not isinstance(node, fx.Node) or len(node.users) > 1:
        return None, 0
    if is_call(node, aten.linear.default):
        return node, 0
    split: Any = node.args[0] if node.target is getitem else None
    if split is None or split.target not in _SPLITS or len(split.args[0].users) > 1:
        return None, 0
    whole, index = split.args[0], int(node.args[1])  # type: ignore[arg-type]
    if len(split.args) < 3 or split.args[2] not in (-1, whole.meta["val"].dim() - 1):
        return None, 0
    if is_call(split, aten.split_with_sizes.default):
        return whole, sum(split.args[1][:index])
    size = split.args[1]
    if is_call(split, aten.chunk.default):
        size = -(-int(whole.meta["val"].shape[-1]) // size)
    return whole, index * size
