"""Operators that change the shape of tensors."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from regraft.frontends.export.builder import INT, Builder, Size, lowers, rank

LAST = 2**63 - 1


@lowers("aten.view", "aten.reshape", "aten._unsafe_view", "aten._reshape_alias")
def view(b: Builder, x: ir.Value, sizes: Any, *_: Any) -> Any:
    if not isinstance(sizes, (list, tuple)):
        return b.cast(x, b.dtype)  # view.dtype of equal kinds
    return b.reshape(x, sizes)


@lowers("aten.view_as", "aten.reshape_as")
def view_as(b: Builder, x: ir.Value, like: ir.Value) -> Any:
    return b.op("Reshape", x, b.op("Shape", like, dtype=INT))


@lowers("aten.transpose", "aten.swapaxes")
def transpose(b: Builder, x: ir.Value, first: int, second: int) -> Any:
    order = list(range(rank(x)))
    order[first], order[second] = order[second], order[first]
    return b.transpose(x, *order)


@lowers("aten.t", "aten.numpy_T")
def t(b: Builder, x: ir.Value) -> Any:
    return b.transpose(x, *reversed(range(rank(x)))) if rank(x) > 1 else x


@lowers("aten.mT", "aten.adjoint")
def m_t(b: Builder, x: ir.Value) -> Any:
    return transpose(b, x, -2, -1)


@lowers("aten.permute")
def permute(b: Builder, x: ir.Value, order: list[int]) -> Any:
    return b.transpose(x, *(d % rank(x) for d in order))


@lowers("aten.movedim")
def movedim(b: Builder, x: ir.Value, source: Any, target: Any) -> Any:
    sources, targets = ([d] if isinstance(d, int) else d for d in (source, target))
    count = rank(x)
    order = [d for d in range(count) if d not in [s % count for s in sources]]
    for place, dim in sorted(zip((d % count for d in targets), sources, strict=True)):
        order.insert(place, dim % count)
    return b.transpose(x, *order)


@lowers("aten.unsqueeze")
def unsqueeze(b: Builder, x: ir.Value, dim: int) -> Any:
    return b.unsqueeze(x, dim)


@lowers("aten.squeeze")
def squeeze(b: Builder, x: ir.Value, dims: Any = None) -> Any:
    if dims is None:
        return b.op("Squeeze", x)
    wanted = [dims] if isinstance(dims, int) else dims
    ones = [d for d in wanted if rank(x) and x.shape[d] == 1]  # type: ignore[index]
    return b.squeeze(x, *ones) if ones else x


@lowers("aten.expand")
def expand(b: Builder, x: ir.Value, sizes: list[Any], *, implicit: bool = False) -> Any:
    return b.op("Expand", x, b.numbers([1 if size == -1 else size for size in sizes]))


@lowers("aten.expand_as")
def expand_as(b: Builder, x: ir.Value, like: ir.Value) -> Any:
    return b.op("Expand", x, b.op("Shape", like, dtype=INT))


@lowers("aten.broadcast_tensors")
def broadcast_tensors(b: Builder, tensors: list[ir.Value]) -> Any:
    total = tensors[0]
    sizes = b.op("Shape", total, dtype=INT)
    for x in tensors[1:]:
        ones = b.op("Expand", b.constant(1), sizes)
        other = b.op("Expand", b.constant(1), b.op("Shape", x, dtype=INT))
        sizes = b.op("Shape", b.op("Mul", ones, other), dtype=INT)
    return [b.op("Expand", x, sizes) for x in tensors]


@lowers("aten.repeat", "aten.tile")
def repeat(b: Builder, x: ir.Value, counts: list[Any]) -> Any:
    if missing := max(0, len(counts) - rank(x)):
        x = b.unsqueeze(x, *range(missing))
    counts = [1] * (rank(x) - len(counts) if x.shape is not None else 0) + list(counts)
    return b.op("Tile", x, b.numbers(counts))


@lowers("aten.repeat_interleave")
def repeat_interleave(b: Builder, x: ir.Value, times: Any, dim: Any = None, **_: Any) -> Any:
    if not isinstance(times, (int, Size)):
        raise NotImplementedError("repeat_interleave by a tensor")
    if dim is None:
        x, dim, count = b.reshape(x, [-1]), 0, 1
    else:
        count = rank(x)
    dim %= count
    wide = b.unsqueeze(x, dim + 1)
    counts = [1] * (count + 1)
    counts[dim + 1] = times
    sizes = [Size(b.size(x, d)) if d != dim else -1 for d in range(count)]
    return b.reshape(b.op("Tile", wide, b.numbers(counts)), sizes)


@lowers("aten.flatten")
def flatten(b: Builder, x: ir.Value, first: int = 0, last: int = -1) -> Any:
    count = rank(x)
    first, last = first % count, last % count
    sizes = [Size(b.size(x, d)) for d in range(count)]
    return b.reshape(x, [*sizes[:first], -1, *sizes[last + 1 :]])


@lowers("aten.unflatten")
def unflatten(b: Builder, x: ir.Value, dim: int, sizes: list[Any]) -> Any:
    dim %= rank(x)
    own = [Size(b.size(x, d)) for d in range(rank(x))]
    return b.reshape(x, [*own[:dim], *sizes, *own[dim + 1 :]])


@lowers("aten.slice")
def slice_(
    b: Builder, x: ir.Value, dim: int = 0, start: Any = None, stop: Any = None, step: int = 1
) -> Any:
    start, stop = 0 if start is None else start, LAST if stop is None else stop
    if (start, stop, step) in ((0, LAST, 1),):
        return x
    return b.slice(x, start, stop, dim, step)


@lowers("aten.narrow")
def narrow(b: Builder, x: ir.Value, dim: int, start: Any, length: Any) -> Any:
    stop = b.op("Add", b.vector(start), b.vector(length))
    return b.slice(x, start, Size(stop), dim)


@lowers("aten.select")
def select(b: Builder, x: ir.Value, dim: int, index: Any) -> Any:
    return b.op("Gather", x, b.to(index, INT), axis=dim)


@lowers("aten.unbind")
def unbind(b: Builder, x: ir.Value, dim: int = 0) -> Any:
    count = x.shape[dim]  # type: ignore[index]
    return [b.op("Gather", x, b.constant(i, INT), axis=dim) for i in range(int(count))]  # type: ignore


@lowers("aten.cat", "aten.concat", "aten.concatenate")
def cat(b: Builder, tensors: list[ir.Value], dim: int = 0) -> Any:
    return b.op("Concat", *(b.to(x) for x in tensors), axis=dim)


@lowers("aten.stack")
def stack(b: Builder, tensors: list[ir.Value], dim: int = 0) -> Any:
    dim %= rank(tensors[0]) + 1
    return b.op("Concat", *(b.unsqueeze(b.to(x), dim) for x in tensors), axis=dim)


@lowers("aten.split_with_sizes", "aten.split_with_sizes_copy")
def split_with_sizes(b: Builder, x: ir.Value, sizes: list[Any], dim: int = 0) -> Any:
    made = b.op("Split", x, b.numbers(sizes), outputs=len(sizes), axis=dim)
    return made if len(sizes) > 1 else [made]


@lowers("aten.split", "aten.unsafe_split")
def split(b: Builder, x: ir.Value, size: Any, dim: int = 0) -> Any:
    if isinstance(size, list):
        return split_with_sizes(b, x, size, dim)
    total = x.shape[dim]  # type: ignore[index]
    if not isinstance(total, int) or not isinstance(size, int):
        raise NotImplementedError("split of a dynamic size")
    sizes = [size] * (total // size) + ([total % size] if total % size else [])
    return split_with_sizes(b, x, sizes, dim)


@lowers("aten.chunk", "aten.unsafe_chunk")
def chunk(b: Builder, x: ir.Value, count: int, dim: int = 0) -> Any:
    total = x.shape[dim]  # type: ignore[index]
    if not isinstance(total, int):
        raise NotImplementedError("chunks of a dynamic size")
    return split(b, x, -(-total // count), dim)


@lowers("aten.unfold")
def unfold(b: Builder, x: ir.Value, dim: int, size: int, step: int) -> Any:
    """Windows of size, step apart, along dim; their elements last."""
    count, dim = rank(x), dim % rank(x)
    last = b.op("Sub", b.size(x, dim), b.constant([size - 1]))
    starts = b.slice(b.range(b.size(x, dim)), 0, Size(last), 0, step)
    places = b.op("Add", b.unsqueeze(starts, 1), b.constant(list(range(size))))
    windows = b.op("Gather", x, places, axis=dim)
    return b.transpose(windows, *(d for d in range(count + 1) if d != dim + 1), dim + 1)


@lowers("aten.flip")
def flip(b: Builder, x: ir.Value, dims: list[int]) -> Any:
    count = len(dims)
    back, ends = b.constant([-1] * count), b.constant([-LAST] * count)
    return b.op("Slice", x, back, ends, b.constant(list(dims)), back)


@lowers("aten.roll")
def roll(b: Builder, x: ir.Value, shifts: Any, dims: Any = ()) -> Any:
    pairs = [(shifts, dims)] if isinstance(shifts, int) else list(zip(shifts, dims, strict=True))
    for shift, dim in pairs:
        dim = dim[0] if isinstance(dim, (list, tuple)) else dim
        shift = shift[0] if isinstance(shift, (list, tuple)) else shift
        parts = b.slice(x, -shift, LAST, dim), b.slice(x, 0, -shift, dim)
        x = b.op("Concat", *parts, axis=dim)
    return x


@lowers("aten.pad", "aten.constant_pad_nd", "aten.reflection_pad1d", "aten.replication_pad1d")
def pad(b: Builder, x: ir.Value, widths: list[Any], mode: Any = "constant", value: Any = 0) -> Any:
    if not isinstance(mode, str):
        mode, value = "constant", mode
    names = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    count, given = rank(x), len(widths) // 2
    begins = [0] * (count - given) + [widths[2 * i] for i in reversed(range(given))]
    ends = [0] * (count - given) + [widths[2 * i + 1] for i in reversed(range(given))]
    filling = b.to(0 if value is None else value) if mode == "constant" else None
    return b.op("Pad", x, b.numbers([*begins, *ends]), filling, mode=names[mode])


@lowers("aten.slice_scatter")
def slice_scatter(
    b: Builder, x: ir.Value, source: ir.Value, dim: int = 0, start: Any = None, stop: Any = None,
    step: int = 1,
) -> Any:  # fmt: skip
    if step != 1:
        order = [dim % rank(x), *(d for d in range(rank(x)) if d != dim % rank(x))]
        back = sorted(range(rank(x)), key=order.__getitem__)
        places = b.slice(b.range(b.size(x, dim % rank(x))), start or 0, _end(stop), 0, step)
        turned = [b.transpose(t, *order) for t in (x, b.to(source))]
        made = b.op("ScatterND", turned[0], b.unsqueeze(places, 1), turned[1])
        return b.transpose(made, *back)
    before = [] if not start else [b.slice(x, 0, start, dim)]
    after = [] if _end(stop) == LAST else [b.slice(x, stop, LAST, dim)]
    return b.op("Concat", *before, b.to(source), *after, axis=dim)


@lowers("aten.select_scatter")
def select_scatter(b: Builder, x: ir.Value, source: ir.Value, dim: int, index: int) -> Any:
    after = [] if index == -1 else [b.slice(x, index + 1, LAST, dim)]
    before = [b.slice(x, 0, index, dim)] if index else []
    return b.op("Concat", *before, b.unsqueeze(b.to(source), dim), *after, axis=dim)


def _end(stop: Any) -> Any:
    return LAST if stop is None else stop
