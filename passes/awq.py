"""Scales of input channels that make rounded weights err least on real activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn

from regraft.kernels.linear.formats import Format
from regraft.kernels.linear.rounding import rounded
from regraft.passes.base import Context, is_call
from regraft.passes.calibrate import PIECES, pieces, vocabulary
from regraft.passes.recorder import record
from regraft.program import Program, RegraftError
from regraft.program.program import source_of

STEPS, TOKENS, ROWS = 20, 1024, 1024
"""Exponents that are tried; tokens and output channels that errors are measured on."""
DECODER = {"ids", "mask", "positions", "cache"}

aten = torch.ops.aten
_NORMS = {aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2,)}
"""Where a normalisation has its factors and what is added to them."""
_SPLITS = (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default)
_SAME = (
    aten.index.Tensor, aten.type_as.default, aten._to_copy.default, aten.to.dtype,
    aten.contiguous.default, aten.clone.default, aten.view.default, aten.reshape.default,
)  # fmt: skip


@dataclass(eq=False)
class Scales:
    """What weights are multiplied with before they are rounded: float32 [in] and [out], by layer.
    errors: by site, what is left of the error of rounded outputs, squared; skipped: layers whose
    input nothing can be folded into."""

    columns: dict[fx.Node, Tensor] = field(default_factory=dict)
    rows: dict[fx.Node, Tensor] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def weight(self, linear: fx.Node, weight: Tensor) -> Tensor:
        """The layer's weight [out, in] as it is to be rounded."""
        if linear in self.columns:
            weight = weight.detach().float() * self.columns[linear]
        if linear in self.rows:
            weight = weight.detach().float() * self.rows[linear][:, None]
        return weight


@dataclass(frozen=True, eq=False)
class _Site:
    """Layers that read one tensor, and what comes before it: a node, and which of its arguments
    are factors, or a linear layer and which of its rows."""

    linears: list[fx.Node]
    source: fx.Node
    places: tuple[int, ...] = ()
    before: fx.Node | None = None
    start: int = 0


def smooth(
    program: Program, linears: Sequence[fx.Node], format: Format, context: Context
) -> Scales:
    """Divide inputs of linear layers by scales, where what comes before can take them; the layers'
    weights are still to be multiplied.

    For each input channel s = mean |x|^a, a of STEPS in [0, 1) with the least squared error of the
    outputs on calibration; layers of one input share s. The quotient goes into the norm, or
    into the linear layer whose product with something else they read. Source: AWQ
    (arXiv 2306.00978), without its search for clipping.
    """
    roles = {spec.role for spec in program.inputs}
    if not roles <= DECODER:
        raise RegraftError('WeightQuant(method="awq") is for decoders: others take "rtn"')
    if not context.calibration:
        raise RegraftError('WeightQuant(method="awq") needs calibration=: batches of token ids')
    batches = pieces(context.calibration, vocabulary(program))
    scales, sites = Scales(), []
    for group in _groups(program, linears):
        site = _site(program, group, linears)
        if site is None:
            why = "nothing before it can take scales: rounded as it is"
            scales.skipped += [(source_of(node), why) for node in group]
        else:
            sites.append(site)
    kept: dict[Any, Tensor] = context.notes.setdefault("awq", {})
    seen = _recorded(program, sites, batches, context)
    for index, (site, (size, x)) in enumerate(zip(sites, seen, strict=True)):
        context.tell(f"scales {index + 1} of {len(sites)}")
        weights = [_weight(program, node) for node in site.linears]
        key = tuple(map(id, weights))
        found, error = _search(x, size, weights, format)
        found = kept.setdefault(key, found)
        scales.errors.append(error)
        scales.columns |= dict.fromkeys(site.linears, found)
        _fold(program, site, found, scales)
    return scales


def _weight(program: Program, linear: fx.Node) -> Tensor:
    return getattr(program.graph_module, str(linear.args[1].target))  # type: ignore


def _groups(program: Program, linears: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """The layers by the tensor that they read, but for those whose weights others share."""
    owners = [id(_weight(program, node)) for node in linears]
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node, owner in zip(linears, owners, strict=True):
        if owners.count(owner) == 1:
            groups.setdefault(_source(node.args[0]), []).append(node)
    return list(groups.values())


def _source(x: Any) -> fx.Node:
    """Where the channels of x were made."""
    while x.target in _SAME and _same_channels(x):
        x = x.args[0]
    return x


def _same_channels(node: Any) -> bool:
    if is_call(node, aten.index.Tensor) and len(node.args[1]) >= node.meta["val"].dim():
        return False
    return node.args[0].meta["val"].shape[-1] == node.meta["val"].shape[-1]


def _site(program: Program, group: list[fx.Node], linears: Sequence[fx.Node]) -> _Site | None:
    source = _source(group[0].args[0])
    if not _read_by(source, set(group)) or source.op != "call_function":
        return None
    if source.target in _NORMS:
        places = _NORMS[source.target]
        given = [i for i in places if i < len(source.args) and source.args[i] is not None]
        return _Site(group, source, tuple(given)) if places[0] in given else None
    if not is_call(source, aten.mul.Tensor):
        return None
    for place, factor in enumerate(source.args):
        if isinstance(factor, fx.Node) and _constant(program, factor) is not None:
            return _Site(group, source, (place,))
    for factor in source.args:
        linear, start = _made_by(factor)
        if (
            is_call(linear, aten.linear.default)
            and linear in linears
            and linear not in group
            and len(linear.args) < 3
        ):
            alone = [_weight(program, node) is _weight(program, linear) for node in linears]
            if sum(alone) == 1:
                return _Site(group, source, before=linear, start=start)
    return None


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
    if node.op == "get_attr":
        value = getattr(program.graph_module, str(node.target)).detach()
        return value if value.dim() == 1 and len(value) > 1 else None
    if is_call(node, aten.add.Tensor) and isinstance(node.args[1], (int, float)):
        value = _constant(program, node.args[0])
        return None if value is None else value + node.args[1]
    return None


def _made_by(node: Any) -> tuple[Any, int]:
    """The linear layer whose outputs a node is, and the first of them; None where others read it."""
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


def _recorded(
    program: Program, sites: Sequence[_Site], batches: Sequence[Tensor], context: Context
) -> list[tuple[Tensor, Tensor]]:
    """For each site the mean magnitude [channels] and some rows [TOKENS, channels] of its input."""
    used = sorted({i * len(batches) // PIECES for i in range(PIECES)})
    total = sum(batches[index].numel() for index in used)
    step = -(-total // TOKENS)
    places = {next(iter(site.source.users)): (0,) for site in sites}
    sums: list[Any] = [0.0] * len(sites)
    rows: list[list[Tensor]] = [[] for _ in sites]
    for turn, index in enumerate(used):
        context.tell(f"calibration {turn + 1} of {len(used)}")
        for number, ((x, _),) in enumerate(record(program, places, batches[index], False).values()):
            x = x.flatten(0, -2).float()
            if not x.isfinite().all():
                where = source_of(sites[number].linears[0])
                raise RegraftError(f"calibration: what {where} reads is not finite")
            sums[number] = sums[number] + x.abs().sum(0)
            rows[number].append(x[turn % step :: step].clone())
    return [(part / total, torch.cat(few)) for part, few in zip(sums, rows, strict=True)]


def _search(
    x: Tensor, size: Tensor, weights: Sequence[Tensor], format: Format
) -> tuple[Tensor, float]:
    """The scales [in] of least error, and what is left of the squared error without any."""
    weight = torch.cat([part.detach()[:: -(-len(part) // ROWS)].float() for part in weights])
    best, least, first = torch.ones_like(size), float("inf"), 0.0
    for step in range(STEPS):
        scale = size.pow(step / STEPS).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        try:
            change = rounded(weight * scale, format) / scale - weight
        except RegraftError:
            if not step:
                raise
            continue
        error = float((x @ change.t()).square().sum())
        first = first if step else error
        if error < least:
            best, least = scale, error
    return best, least / first if first else 1.0


def _fold(program: Program, site: _Site, scale: Tensor, scales: Scales) -> None:
    """Let what comes before the layers give their input divided by scale."""
    if site.before is not None:
        count = int(site.before.meta["val"].shape[-1])
        rows = scales.rows.get(site.before, torch.ones(count)).clone()
        rows[site.start : site.start + len(scale)] /= scale
        scales.rows[site.before] = rows
        return
    arguments = list(site.source.args)
    for place in site.places:
        factor: Any = arguments[place]
        value = _constant(program, factor)
        assert value is not None
        name = f"{site.linears[0].args[1].target}_input_{place}"  # type: ignore[union-attr]
        made = nn.Parameter((value.float() / scale).to(value.dtype), requires_grad=False)
        program.graph_module.register_parameter(name, made)
        with program.graph.inserting_before(site.source):
            arguments[place] = program.graph.get_attr(name)
        arguments[place].meta = {**factor.meta, "val": made}
    site.source.args = tuple(arguments)
