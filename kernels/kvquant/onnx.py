"""The quantized cache in standard ONNX operators: the body of the function that exports call.

Codes lie as ``onnx_codes.planes`` says, not as the kernels' layouts; what they mean is the
reference's. b is a ``frontends.export.builder.Builder``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from regraft.kernels.attention.onnx import attention
from regraft.kernels.kvquant.feedback import turns
from regraft.kernels.kvquant.hadamard import hadamard
from regraft.kernels.kvquant.layout import BLOCK
from regraft.kernels.kvquant.onnx_codes import pack, unpack
from regraft.kernels.rotary.onnx import rotate

HALF, FLOAT, INT, BYTE = torch.float16, torch.float32, torch.int64, torch.uint8
INDEX = ir.TensorType(ir.DataType.INT64)
LIMIT = torch.finfo(HALF).max
TENSORS = ("levels", "midpoints", "scale", "zero", "matrix", "weight")
"""What a layer's keys, and values, are coded by: float32, but for the float16 scale, zero and
weight. Those that are None are left out."""


@dataclass(frozen=True)
class Side:
    """How keys or values [B, heads, T, size] are coded: count outliers a token, of all heads; keys
    without calibration have ranges of ``group`` tokens."""

    kind: str
    bits: int
    count: int
    heads: int
    size: int
    group: int

    @property
    def state(self) -> dict[str, tuple[tuple[int | str, ...], torch.dtype]]:
        """Shape and dtype of what the cache holds beside the exact tokens."""
        batch, kind = "batch_size", self.kind
        whole = self.heads * self.size
        bytes_ = self.size * self.bits // 8
        parts: dict[str, Any] = {"codes": ((batch, self.heads, "body_length", bytes_), BYTE)}
        if kind == "value":
            scale: tuple[int | str, ...] = (batch, "body_length")
        else:
            scale = (batch, self.heads, "groups", self.size)
        if kind == "value" or self.group:
            parts |= {"scale": (scale, HALF), "zero": (scale, HALF)}
        if self.count:
            rows, many = ("blocks", BLOCK * self.count), BLOCK * whole
            if kind == "value":
                rows, many = ("body_length", self.count), whole
            places = torch.uint16 if many <= 2**16 else torch.int32
            parts |= {"outliers": ((batch, *rows), HALF), "places": ((batch, *rows), places)}
        return {f"{kind}_{name}": part for name, part in parts.items()}


def cached_attention(
    b: Any, q: Any, k: Any, v: Any, mask: Any, padding: Any, cos: Any, sin: Any, sinks: Any,
    *rest: Any, names: Sequence[str], sides: tuple[Side, Side], sink: int, tail: int, spread: bool,
    scale: float, softcap: float,
) -> list[Any]:  # fmt: skip
    """Attend unrotated q to the cache and to k, v [B, H, S, D] that it is given: the output and
    the cache, its tensors in the order of ``Side.state``.

    padding: int64 [B], the tokens of each row to put behind its sink, or None. cos, sin:
    [B, T, D/2] of all positions, the last those of q, or None. rest: tensors by names:
    the past cache, and key_* and value_* of TENSORS. What has left the tail is coded first.
    spread: see ``QuantizedLayer``.
    """
    given = dict(zip(names, rest, strict=True))
    if cos is not None:
        length = b.size(cos, 1)
        first = b.op("Sub", length, b.size(q, 2))
        new = [b.op("Slice", t, first, length, b.constant([1])) for t in (cos, sin)]
        q, k = (rotate(b, x, *(_rows(t, cos) for t in new), False, 0) for x in (q, k))
    if spread:
        q, k = (_spread(b, x, sides[0].size) for x in (q, k))
        v = _spread(b, v, sides[1].size)
    key, value = given["key"], given["value"]
    body, past = b.size(given["key_codes"], 2), b.size(key, 2)
    if padding is not None:
        start = b.op("Equal", past, b.constant([0]), dtype=torch.bool)
        mask = _sinks_first(b, mask, padding, sink, 3)
        now = b.op("Where", start, padding, b.constant([0]), dtype=INT)
        k, v = (_sinks_first(b, x, now, sink, 2) for x in (k, v))
    step = sides[0].group or BLOCK
    spare = b.op("Sub", past, b.constant([sink + tail]))
    spare = b.op("Max", spare, b.constant([0]))
    count = b.op("Mul", b.op("Div", spare, b.constant([step])), b.constant([step]))
    end = b.op("Add", count, b.constant([sink]))
    gone = [b.op("Slice", x, b.constant([sink]), end, b.constant([2])) for x in (key, value)]
    begin = b.op("Add", body, b.constant([sink]))
    if cos is not None and not spread:
        there = [b.op("Slice", t, begin, b.op("Add", begin, count), b.constant([1]))
                 for t in (cos, sin)]  # fmt: skip
    else:
        there = []
    coded = [name for side in sides for name in side.state]
    shapes = {name: part for side in sides for name, part in side.state.items()}

    def code(inner: Any) -> list[Any]:
        x = inner.cast(gone[0], FLOAT)
        x.shape = ir.Shape([None, sides[0].heads, None, sides[0].size])
        if there:
            x = _turned_back(inner, x, *there)
        parts = _quantize(inner, x, sides[0], given)
        parts |= _quantize(inner, inner.cast(gone[1], FLOAT), sides[1], given)
        return [parts[name] for name in coded]

    def nothing(inner: Any) -> list[Any]:
        batch = inner.size(q, 0)
        return [
            inner.op(
                "Expand",
                inner.constant(torch.zeros((1,) * len(shapes[name][0])), shapes[name][1]),
                inner.numbers(
                    [batch, *(n if isinstance(n, int) else 0 for n in shapes[name][0][1:])]
                ),
            )
            for name in coded
        ]

    some = b.op("Greater", b.squeeze(count, 0), b.constant(0), dtype=torch.bool)
    made = b.either(some, code, nothing)
    axes = {"codes": 2}
    states = {}
    for name, new in zip(coded, made, strict=True):
        axis = axes.get(name.split("_")[1], 2 if name in ("key_scale", "key_zero") else 1)
        states[name] = b.op("Concat", given[name], new, axis=axis)
    kept = [
        (b.slice(x, 0, sink, 2), b.op("Slice", x, end, b.constant([2**31]), b.constant([2])))
        for x in (key, value)
    ]
    keys = _dequantize(b, sides[0], states, given)
    if there:
        stop = b.op("Add", begin, count)
        rows = [b.op("Slice", t, b.constant([sink]), stop, b.constant([1])) for t in (cos, sin)]
        keys = rotate(b, keys, *(_rows(t, cos) for t in rows), False, 0)
    dtype = given["key"].dtype
    middles = keys, _dequantize(b, sides[1], states, given)
    whole = []
    for (front, back), middle, new in zip(kept, middles, (k, v), strict=True):
        middle = b.op("CastLike", middle, front)
        joined = b.op("Concat", front, middle, back, new, axis=2)
        joined.shape, joined.dtype = new.shape, dtype
        whole.append(joined)
    exact = [b.op("Concat", *parts, new, axis=2) for parts, new in zip(kept, (k, v), strict=True)]
    out = attention(b, q, *whole, mask, sinks, scale, softcap, True)
    if spread:
        out = _spread(b, out, sides[1].size)
    return [out, *exact, *states.values()]


def _spread(b: Any, x: Any, size: int) -> Any:
    """There and, once more, back."""
    made = b.op("MatMul", x, b.op("CastLike", b.constant(hadamard(size)), x))
    made.shape = x.shape
    return made


def _sinks_first(b: Any, x: Any, padding: Any, sink: int, dim: int) -> Any:
    """x [B or 1, ...] with the slots of each row along dim as ``runtime.quantized`` has them: its
    first ``sink`` real tokens, then its padding [B], then the rest."""

    def moved(inner: Any) -> list[Any]:
        slot = inner.unsqueeze(inner.range(inner.size(x, dim)), 0)
        ahead = inner.unsqueeze(padding, 1)
        back = inner.op("Sub", slot, inner.constant([sink]))
        behind = inner.op("Less", back, ahead, dtype=torch.bool)
        rest = inner.op("Where", behind, back, slot, dtype=INT)
        front = inner.op("Less", slot, inner.constant([sink]), dtype=torch.bool)
        slots = inner.op("Where", front, inner.op("Add", slot, ahead), rest, dtype=INT)
        wide = inner.op("Concat", inner.size(padding, 0), inner.constant([1, 1, 1]), axis=0)
        order = (0, 2, 1, 3) if dim == 2 else (0, 3, 1, 2)
        back_order = (0, 2, 1, 3) if dim == 2 else (0, 2, 3, 1)
        turned = inner.transpose(inner.op("Expand", x, wide), *order)
        taken = inner.op("GatherND", turned, inner.unsqueeze(slots, 2), batch_dims=1)
        return [inner.transpose(taken, *back_order)]

    most = b.op("ReduceMax", padding, keepdims=0)
    some = b.op("Greater", most, b.constant(0), dtype=torch.bool)
    made = b.either(some, moved, lambda inner: [x])
    made[0].shape = x.shape
    return made[0]


def _rows(table: Any, like: Any) -> Any:
    table.shape = like.shape
    return table


def _turned_back(b: Any, k: Any, cos: Any, sin: Any) -> Any:
    """Keys before their rotation, which may stretch."""
    cos.shape = sin.shape = ir.Shape([None, None, int(k.shape[3]) // 2])
    square = b.op("Add", b.op("Mul", cos, cos), b.op("Mul", sin, sin))
    wide = b.unsqueeze(b.op("Concat", square, square, axis=-1), 1)
    back = b.op("Neg", sin)
    back.shape = sin.shape
    turned = b.op("Div", rotate(b, k, cos, back, False, 0), wide)
    turned.shape = k.shape
    return turned


def _quantize(b: Any, x: Any, side: Side, given: dict[str, Any]) -> dict[str, Any]:
    """The state of whole blocks x [B, H, T, D], float32; see ``reference.quantize``."""
    kind, size = side.kind, side.size
    book = {name: given.get(f"{kind}_{name}") for name in TENSORS}
    parts: dict[str, Any] = {}
    exact = None
    if kind == "value":
        low, high, exact = _value_range(b, x, side)
        scale, zero = parts["scale"], parts["zero"] = _scale_and_zero(b, low, high)
        scale, zero = (b.unsqueeze(b.cast(t, FLOAT), 1, 3) for t in (scale, zero))
    elif side.group:
        groups = b.op("Reshape", x, b.constant([0, 0, -1, side.group, size]))
        low, high = (
            b.op(f"Reduce{n}", groups, b.constant([3]), keepdims=0) for n in ("Min", "Max")
        )
        scale, zero = parts["scale"], parts["zero"] = _scale_and_zero(b, low, high)
        scale, zero = (_by_group(b, b.cast(t, FLOAT), side) for t in (scale, zero))
    else:
        scale, zero = (b.cast(book[name], FLOAT) for name in ("scale", "zero"))
    none = b.op("Equal", scale, b.constant(0.0), dtype=torch.bool)
    safe = b.op("Where", none, b.constant(1.0), scale, dtype=FLOAT)
    y = b.op("Div", b.op("Sub", x, zero), safe)
    if side.count and kind == "key":
        code = _search(b, y, book["midpoints"], side.bits)
        read = _read(b, code, book["levels"], scale, zero)
        error = b.op("Abs", b.op("Sub", x, read))
        if book["weight"] is not None:
            error = b.op("Mul", error, b.cast(book["weight"], FLOAT))
        exact = _largest(b, error, side)
    aim = y
    if book["matrix"] is None:
        code = _search(b, y, book["midpoints"], side.bits)
    else:
        kept = None if exact is None else _mask(b, exact, side)
        code, aim = _in_turn(b, y, book, side, kept)
    target = x if aim is y else b.op("Add", x, b.op("Mul", b.op("Sub", aim, y), scale))
    parts["codes"] = pack(b, code, side.bits, size)
    if exact is not None:
        residual = b.op("Sub", target, _read(b, code, book["levels"], scale, zero))
        flat = _flat(b, residual, side)
        chosen = b.op("GatherElements", flat, exact[0], axis=-1)
        chosen = b.op("Max", b.op("Min", chosen, b.constant(LIMIT)), b.constant(-LIMIT))
        chosen = b.op("Where", exact[1], chosen, b.constant(0.0), dtype=FLOAT)
        parts["outliers"] = b.cast(chosen, HALF)
        parts["places"] = b.cast(exact[0], side.state[f"{kind}_places"][1])
    return {f"{kind}_{name}": part for name, part in parts.items()}


def _scale_and_zero(b: Any, low: Any, high: Any) -> tuple[Any, Any]:
    limit = b.constant(LIMIT)
    zero = b.op("Mul", b.op("Add", high, low), b.constant(0.5))
    zero = b.op("Max", b.op("Min", zero, limit), b.constant(-LIMIT))
    scale = b.op("Min", b.op("Mul", b.op("Sub", high, low), b.constant(0.5)), limit)
    return b.cast(scale, HALF), b.cast(zero, HALF)


def _by_group(b: Any, x: Any, side: Side) -> Any:
    """[B, H, groups, D] repeated for each token of its group."""
    wide = b.op("Tile", b.unsqueeze(x, 3), b.constant([1, 1, 1, side.group, 1]))
    return b.op("Reshape", wide, b.constant([0, 0, -1, side.size]))


def _flat(b: Any, x: Any, side: Side) -> Any:
    """x [B, H, T, D] as rows that share their outliers: of keys blocks [B, N, 32 * H * D], of
    values tokens [B, T, H * D]."""
    many = (BLOCK if side.kind == "key" else 1) * side.heads * side.size
    return b.op("Reshape", b.transpose(x, 0, 2, 1, 3), b.constant([0, -1, many]))


def _unflat(b: Any, x: Any, side: Side) -> Any:
    rows = b.op("Reshape", x, b.constant([0, -1, side.heads, side.size]))
    return b.transpose(rows, 0, 2, 1, 3)


def _value_range(b: Any, v: Any, side: Side) -> tuple[Any, Any, Any]:
    """Lowest and highest number of a token [B, T], outliers left out, and where those are."""
    flat = _flat(b, v, side)
    high, low = side.count - side.count // 2, side.count // 2
    ends, places = [], []
    for n, largest in ((high, 1), (low, 0)):
        k = min(n + 1, side.heads * side.size)
        top, index = b.op(
            "TopK", flat, b.constant([k]), outputs=2, axis=-1, largest=largest, sorted=1
        )
        index.type = INDEX
        ends.append(b.op("Gather", top, b.constant(k - 1), axis=-1))
        places.append(b.slice(index, 0, n, -1))
    if not side.count:
        return ends[1], ends[0], None
    index = b.op("Concat", *places, axis=-1)
    every = b.op("Expand", b.constant(True), b.op("Shape", index, dtype=INT))
    return ends[1], ends[0], (index, every)


def _largest(b: Any, error: Any, side: Side) -> Any:
    """Places of a block's largest errors, and which of them are above 0."""
    flat = _flat(b, error, side)
    k = b.constant([BLOCK * side.count])
    top, index = b.op("TopK", flat, k, outputs=2, axis=-1, largest=1, sorted=1)
    index.type = INDEX
    return index, b.op("Greater", top, b.constant(0.0), dtype=torch.bool)


def _mask(b: Any, exact: Any, side: Side) -> Any:
    """1.0 where a number is an outlier [B, H, T, D]."""
    index, used = exact
    return _scattered(b, index, b.cast(used, FLOAT), side)


def _scattered(b: Any, index: Any, x: Any, side: Side) -> Any:
    """x at places index of rows that share their outliers, else 0, [B, H, T, D]."""
    many = (BLOCK if side.kind == "key" else 1) * side.heads * side.size
    sizes = b.op("Concat", b.op("Shape", index, dtype=INT, end=2), b.constant([many]), axis=0)
    zeros = b.op("Expand", b.constant(0.0), sizes)
    return _unflat(b, b.op("ScatterElements", zeros, index, x, axis=2), side)


def _search(b: Any, y: Any, midpoints: Any, bits: int) -> Any:
    """How many midpoints lie below y, int32, by halving."""
    code = None
    for step in (2**i for i in reversed(range(bits))):
        if code is None:
            middle = b.op("Gather", midpoints, b.constant(step - 1), axis=0)
        else:
            place = b.op("Add", code, b.constant(step - 1, torch.int32))
            middle = b.op("Gather", midpoints, place, axis=0)
        above = b.cast(b.op("Greater", y, middle, dtype=torch.bool), torch.int32)
        above = b.op("Mul", above, b.constant(step, torch.int32))
        code = above if code is None else b.op("Add", code, above)
    return code


def _read(b: Any, code: Any, levels: Any, scale: Any, zero: Any) -> Any:
    level = b.op("Gather", levels, code, axis=0)
    return b.op("Add", b.op("Mul", level, scale), zero)


def _in_turn(b: Any, y: Any, book: dict[str, Any], side: Side, exact: Any) -> tuple[Any, Any]:
    """``Feedback.in_turn``: codes and what they stand for."""
    order = turns(side.size)
    first = b.op("Gather", b.transpose(y, 3, 0, 1, 2), b.constant(order), axis=0)
    steps = b.unsqueeze(b.transpose(book["matrix"], 1, 2, 0), 2, 4)
    marks = [] if exact is None else [
        b.op("Gather", b.transpose(exact, 3, 0, 1, 2), b.constant(order), axis=0)
    ]  # fmt: skip

    def turn(inner: Any, aim: Any, i: Any, own: Any, step: Any, *kept: Any) -> list[Any]:
        now = inner.op("Gather", aim, i, axis=0)
        code = _search(inner, now, book["midpoints"], side.bits)
        read = inner.op("Gather", book["levels"], code, axis=0)
        if kept:
            sure = inner.op("Greater", kept[0], inner.constant(0.0), dtype=torch.bool)
            read = inner.op("Where", sure, now, read, dtype=FLOAT)
        error = inner.unsqueeze(inner.op("Sub", own, read), 0)
        return [inner.op("Add", aim, inner.op("Mul", error, step)), code]

    numbers = b.constant(torch.arange(side.size))
    aim, code = b.scan(turn, [first], [numbers, first, steps, *marks])
    back = b.constant(order.argsort())
    code, aim = (b.transpose(b.op("Gather", x, back, axis=0), 1, 2, 3, 0) for x in (code, aim))
    return code, aim


def _dequantize(b: Any, side: Side, states: dict[str, Any], given: dict[str, Any]) -> Any:
    """The body [B, H, T, D] as it reads, float32; keys not rotated."""
    kind = side.kind
    code = unpack(b, states[f"{kind}_codes"], side.bits, side.size)
    if kind == "value":
        scale, zero = (
            b.unsqueeze(b.cast(states[f"value_{name}"], FLOAT), 1, 3) for name in ("scale", "zero")
        )
    elif side.group:
        scale, zero = (
            _by_group(b, b.cast(states[f"key_{name}"], FLOAT), side) for name in ("scale", "zero")
        )
    else:
        scale, zero = (b.cast(given[f"key_{name}"], FLOAT) for name in ("scale", "zero"))
    read = _read(b, code, given[f"{kind}_levels"], scale, zero)
    if side.count:
        index = b.cast(b.cast(states[f"{kind}_places"], torch.int32), INT)
        residual = b.cast(states[f"{kind}_outliers"], FLOAT)
        read = b.op("Add", read, _scattered(b, index, residual, side))
    read.shape = ir.Shape([None, side.heads, None, side.size])
    return read
