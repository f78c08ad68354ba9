"""Nodes whose weights stay packed, in the tiles that kernels read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor

from regraft.frontends.onnx.values import as_tensor
from regraft.kernels.linear.formats import HALVES, Format, pack, parse
from regraft.kernels.linear.onnx import PARTS

if TYPE_CHECKING:
    from regraft.frontends.onnx.plan import Plan

BLOCKS = (32, 64, 128)
ops = torch.ops.regraft
Inputs = list[ir.Value | None]
Kept = tuple[Callable[..., Tensor], Inputs]
Weights = tuple[ir.Value, str, int, int]
"""Where packed weights are, their format, rows and columns."""


def kept_packed(plan: Plan, node: ir.Node) -> Kept | None:
    """What computes a node from packed weights, and its inputs then. None for other nodes, and
    where weights are no constants, or of blocks or scales that packed weights cannot have."""
    name, inputs = node.op_type.split("_")[0], list(node.inputs)
    if (node.domain, name) == ("com.microsoft", "MatMulNBits"):
        inputs += [None] * (6 - len(inputs))
        found = _blocks(plan, node, inputs)
        return found and (_linear(found), [inputs[0], found[0], inputs[5]])
    function = plan.module.functions.get((node.domain, node.op_type, node.overload))
    if node.domain != "ai.regraft" or function is None:
        return None
    settings = {key: attribute.value for key, attribute in function.attributes.items()}
    if name in ("HalfLinear", "PackedLinear"):
        x, bias, *given = inputs
        found = _parts(plan, given, settings)
        return found and (_linear(found), [x, found[0], bias])
    if name in ("HalfEmbedding", "PackedEmbedding"):
        ids, *given = inputs
        found = _parts(plan, given, settings)
        return found and (_embedding(found), [ids, found[0]])
    return None


def _linear(weights: Weights) -> Callable[..., Tensor]:
    _, format, rows, _ = weights
    return lambda x, packed, bias: ops.packed_linear(x, packed, bias, format, rows)


def _embedding(weights: Weights) -> Callable[..., Tensor]:
    _, format, rows, columns = weights
    return lambda ids, packed: ops.packed_embedding(ids, packed, format, rows, columns)


def _parts(plan: Plan, given: Inputs, settings: dict[str, Any]) -> Weights | None:
    """The weights that a function of Regraft's own exports reads."""
    values = [_constant(plan, value) for value in given]
    if any(held is None for value, held in zip(given, values, strict=True) if value is not None):
        return None
    parts = {name: held for name, held in zip(PARTS, values, strict=False) if held is not None}
    codes = parts.pop("codes")
    if not settings:
        format = next(name for name, dtype in HALVES.items() if dtype == codes.dtype)
        return given[0], format, int(codes.shape[0]), int(codes.shape[1])  # type: ignore[return-value]
    kind = Format(settings["bits"], settings["group"], *(bool(settings[k]) for k in _FLAGS))
    if "high" in parts:
        codes = _joined(codes, parts.pop("high"))
    else:
        codes = (codes.to(torch.int16) + (1 << (kind.bits - 1))).to(torch.uint8)
    turned = {name: x.t() for name, x in parts.items()}
    return _packed(plan, given, kind, codes.t(), turned)


_FLAGS = ("zero", "nested")


def _joined(low: Tensor, high: Tensor) -> Tensor:
    """Codes of 6 bits [columns, rows] of their low and high ones, see ``export.packed``."""
    fours = torch.cat((low & 15, low >> 4))
    return fours | torch.cat([high >> 2 * i & 3 for i in range(4)]) << 4


def _blocks(plan: Plan, node: ir.Node, inputs: Inputs) -> Weights | None:
    """The weights of MatMulNBits, if they count from the middle and scales are float16's."""
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    bits, group = given.get("bits", 4), given.get("block_size")
    rows, columns = int(given["N"]), int(given["K"])
    codes, scale = (_constant(plan, value) for value in inputs[1:3])
    if codes is None or scale is None or inputs[3] is not None or inputs[4] is not None:
        return None
    if bits not in (4, 8) or group not in BLOCKS or columns % group:
        return None
    half = scale.reshape(rows, -1).half()
    if not torch.equal(half.float(), scale.reshape(rows, -1).float()):
        return None
    codes = codes.reshape(rows, -1)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
    return _packed(plan, inputs[1:3], Format(bits, group), codes, {"scale": half})


def _packed(
    plan: Plan, given: Inputs, format: Format, codes: Tensor, parts: dict[str, Tensor]
) -> Weights:
    """Codes [rows, columns] and parts [rows, groups] packed, once for all that reads them."""
    known, key, (rows, columns) = plan.module.packed, tuple(given), codes.shape
    if key not in known:
        known[key] = ir.Value(name=f"{given[0].name}_packed")  # type: ignore[union-attr]
        plan.hold(known[key], pack(parse(format.name), codes, **parts))
    return known[key], format.name, rows, columns


def _constant(plan: Plan, value: ir.Value | None) -> Tensor | None:
    """A constant, or what casts and transposes make of one."""
    if value is None:
        return None
    if value in plan.constants:
        held = as_tensor(plan.constants[value]())
        return held.detach() if torch.is_tensor(held) else None
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Cast", "Transpose"):
        return None
    held = _constant(plan, node.inputs[0])
    if held is None:
        return None
    if node.op_type == "Transpose":
        return held.permute(node.attributes["perm"].as_ints())
    return held.float() if node.attributes["to"].as_int() == ir.DataType.FLOAT else None
