"""Scales of input channels that make rounded weights err least on real activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from regraft.kernels.linear.formats import Format
from regraft.kernels.linear.rounding import rounded
from regraft.passes.base import Context
from regraft.passes.calibrate import PIECES, pieces, vocabulary
from regraft.passes.fold_scales import Site, find, fold, weight_of
from regraft.passes.recorder import record
from regraft.program import Program, RegraftError
from regraft.program.program import source_of

STEPS, TOKENS, ROWS = 20, 512, 512
"""Exponents that are tried; tokens and output channels that errors are measured on."""
DECODER = {"ids", "mask", "positions", "cache"}


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


def smooth(
    program: Program, linears: Sequence[fx.Node], format: Format, context: Context
) -> Scales:
    """Divide inputs of linear layers by scales, where what comes before can take them; the layers'
    weights are still to be multiplied.

    For each input channel s = mean |x|^a, a of STEPS in [0, 1) with the least squared error of the
    outputs on calibration; layers of one input share s. The quotient goes into the norm before, or
    into the linear layer whose product with something else they read. Source: AWQ
    (arXiv 2306.00978), without its search for clipping and its scales between the values and the
    output of attention, which gained nothing where heads share values.
    """
    roles = {spec.role for spec in program.inputs}
    if not roles <= DECODER:
        raise RegraftError('WeightQuant(method="awq") is for decoders: others take "rtn"')
    if not context.calibration:
        raise RegraftError('WeightQuant(method="awq") needs calibration=: batches of token ids')
    batches = pieces(context.calibration, vocabulary(program))
    sites, others = find(program, linears)
    scales = Scales(skipped=[(source_of(node), _LEFT) for node in others])
    kept: dict[Any, Tensor] = context.notes.setdefault("awq", {})
    seen = _recorded(program, sites, batches, context)
    for index, (site, (size, x)) in enumerate(zip(sites, seen, strict=True)):
        context.tell(f"scales {index + 1} of {len(sites)}")
        weights = [weight_of(program, node) for node in site.linears]
        found, error = _search(x, size, weights, format)
        found = kept.setdefault(tuple(map(id, weights)), found)
        scales.errors.append(error)
        scales.columns |= dict.fromkeys(site.linears, found)
        if (rows := fold(program, site, found)) is not None:
            assert site.before is not None
            scales.rows[site.before] = scales.rows.get(site.before, 1) * rows
    return scales


_LEFT = "nothing before it can take scales: rounded as it is"


def _recorded(
    program: Program, sites: Sequence[Site], batches: Sequence[Tensor], context: Context
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
