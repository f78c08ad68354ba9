"""Weights of linear layers in 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regraft.kernels.linear.formats import Format
from regraft.kernels.linear.rounding import round_to_nearest
from regraft.passes.base import Context, Pass, PassResult
from regraft.passes.packed import linears, put, refuse_packed, replace_linear
from regraft.program import Program, RegraftError
from regraft.program.program import source_of

GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class WeightQuant(Pass):
    """x W' -> packed_linear(x, codes of W)     lossy: half a code's step of each group

    bits: 8 (codes around zero) or 4 (between the least and the largest weight). group: columns
    that share a scale, 32, 64 or 128; None for a whole row, at 8 bits. Weights are rounded to the
    nearest code (method "rtn"). An embedding that shares its weights with the last layer keeps its
    own. Passes that need float weights go before.
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
        if self.method != "rtn":
            raise RegraftError(f'WeightQuant(method={self.method!r}): "rtn" is the only method')

    def apply(self, program: Program, context: Context) -> PassResult:
        refuse_packed(program, "WeightQuant")
        format = Format(self.bits, self.group or 0, zero=self.bits == 4)
        made: dict[int, tuple[Tensor, float]] = context.notes.setdefault("rounded", {})
        errors: dict[str, float] = {}
        nodes = linears(program)
        for index, node in enumerate(nodes):
            context.tell(f"weights {index + 1} of {len(nodes)}")
            name = str(node.args[1].target)
            weight = getattr(program.graph_module, name)
            if id(weight) not in made:
                made[id(weight)] = self._rounded(weight, format, source_of(node))
            packed, errors[name] = made[id(weight)]
            replace_linear(program, node, put(program, f"{name}_packed", packed, node), format.name)
        return PassResult(len(nodes), picture=_picture(format, errors))

    def _rounded(self, weight: Tensor, format: Format, where: str) -> tuple[Tensor, float]:
        if not weight.is_floating_point() or weight.dtype == torch.float64:
            raise RegraftError(f"WeightQuant: {where} has weights of {weight.dtype}")
        columns = weight.shape[1]
        if self.group and columns % self.group:
            raise RegraftError(
                f"WeightQuant: {where}: {columns} columns do not divide into groups of "
                f"{self.group}: take smaller ones, or group=None at 8 bits"
            )
        try:
            return round_to_nearest(weight, format)
        except RegraftError as error:
            raise RegraftError(f"WeightQuant: {where}: {error}") from error


def _picture(format: Format, errors: dict[str, float]) -> str:
    if not errors:
        return ""
    worst = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    return (
        f"weights in {format.name}: error {mean:.2%} of their norm in the mean, at most "
        f"{errors[worst]:.2%} ({worst})"
    )
