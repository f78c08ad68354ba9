"""Weights of linear layers in 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from regraft.kernels.linear.formats import Format
from regraft.kernels.linear.rounding import round_to_nearest
from regraft.passes.awq import Scales, smooth
from regraft.passes.base import Context, Pass, PassResult
from regraft.passes.packed import linears, put, refuse_packed, replace_linear
from regraft.passes.raise_linear import RaiseLinear
from regraft.program import Program, RegraftError
from regraft.program.program import source_of

GROUPS = (32, 64, 128)
METHODS = ("rtn", "awq")


@dataclass(frozen=True)
class WeightQuant(Pass):
    """x W' -> packed_linear(x, codes of W)     lossy: half a code's step of each group

    bits: 8 (codes around zero) or 4 (between the least and the largest weight). group: columns
    that share a scale, 32, 64 or 128; None for a whole row, at 8 bits. Weights are rounded to the
    nearest code (method "rtn"), or first scaled, each input channel by how large it is on the
    calibration batches of ``compile`` (method "awq", see ``passes/awq.py``). An embedding that
    shares its weights with the last layer keeps its own. Passes that need float weights go before.
    """

    bits: int = 8
    group: int | None = 32
    method: str = "rtn"
    tolerance: ClassVar[float | None] = None
    reads_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.group not in (*GROUPS, None):
            raise RegraftError(
                f"WeightQuant(bits={self.bits}, group={self.group}): bits are 4 or 8, a group is "
                "32, 64, 128 or None"
            )
        if self.bits == 4 and self.group is None:
            raise RegraftError("WeightQuant: 4 bits need groups of 32, 64 or 128")
        if self.method not in METHODS:
            raise RegraftError(f"WeightQuant(method={self.method!r}): one of {', '.join(METHODS)}")

    def apply(self, program: Program, context: Context) -> PassResult:
        refuse_packed(program, "WeightQuant")
        format = Format(self.bits, self.group or 0, zero=self.bits == 4)
        made: dict[int, tuple[Tensor, float]] = context.notes.setdefault("rounded", {})
        errors: dict[str, float] = {}
        RaiseLinear().apply(program, context)
        nodes = linears(program)
        scales = self._scales(program, nodes, format, context)
        for index, node in enumerate(nodes):
            context.tell(f"weights {index + 1} of {len(nodes)}")
            name = str(node.args[1].target)
            weight = getattr(program.graph_module, name)
            if id(weight) not in made:
                scaled = scales.weight(node, weight)
                made[id(weight)] = self._rounded(scaled, format, source_of(node))
            packed, errors[name] = made[id(weight)]
            replace_linear(program, node, put(program, f"{name}_packed", packed, node), format.name)
        picture = _picture(format, errors, scales)
        return PassResult(len(nodes), tuple(scales.skipped), picture)

    def _scales(
        self, program: Program, nodes: list[fx.Node], format: Format, context: Context
    ) -> Scales:
        for node in nodes:
            self._check(getattr(program.graph_module, str(node.args[1].target)), source_of(node))
        return smooth(program, nodes, format, context) if self.method == "awq" else Scales()

    def _check(self, weight: Tensor, where: str) -> None:
        if not weight.is_floating_point() or weight.dtype == torch.float64:
            raise RegraftError(f"WeightQuant: {where} has weights of {weight.dtype}")
        columns = weight.shape[1]
        if self.group and columns % self.group:
            raise RegraftError(
                f"WeightQuant: {where}: {columns} columns do not divide into groups of "
                f"{self.group}: take smaller ones, or group=None at 8 bits"
            )
        if not weight.isfinite().all():
            raise RegraftError(f"WeightQuant: {where}: it holds weights that are no finite numbers")

    def _rounded(self, weight: Tensor, format: Format, where: str) -> tuple[Tensor, float]:
        try:
            return round_to_nearest(weight, format)
        except RegraftError as error:
            raise RegraftError(f"WeightQuant: {where}: {error}") from error


def _picture(format: Format, errors: dict[str, float], scales: Scales) -> str:
    if not errors:
        return ""
    worst = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    picture = (
        f"weights in {format.name}: error {mean:.2%} of their norm in the mean, at most "
        f"{errors[worst]:.2%} ({worst})"
    )
    if scales.errors:
        left = sum(scales.errors) / len(scales.errors)
        picture += f"; scales leave {left:.0%} of the squared error of {len(scales.errors)} inputs"
    return picture
