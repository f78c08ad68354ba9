"""Programs that take one token, or so many at once, as one graph for any number of tokens.

The graph of single tokens is the body of a Loop over them. Where a program has a prefill, that
takes the tokens, and an If leaves too few of them to the Loop; a prefill that takes no more than
so many is in turn, with that If, the body of a Loop over pieces of the tokens. A prefill that takes
any number, and computes a single token alike, is all there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
import torch

from regraft.frontends.export.builder import DTYPES, Builder, Size, State, Weights
from regraft.frontends.export.step import step
from regraft.program import Program, TensorSpec

IDS, MASK, POSITIONS = TOKENS = ("input_ids", "attention_mask", "position_ids")
TOLERANCE = 1e-5
Values = dict[str, ir.Value]
Made = list[ir.Value]
"""The logits [B, S, V] and the states that a step leaves, in the order of those given to it."""


def sequence(b: Builder, program: Program, given: Values) -> Made:
    """The outputs of ``step``, for any number of tokens [B, S]."""
    if program.prefill is not None and _serves_one(program, program.prefill):
        return step(b, program.prefill, given)
    beside = _beside(b, program, given)
    count = 1 + len(given) - len(TOKENS)
    given |= {name: _input(name, state) for name, state in beside.items()}
    results = (_rows if program.inputs[0].shape[0] == 1 else _pieces)(b, program, given)
    b.given, b.presents = given, {
        name: replace(state, value=value)
        for (name, state), value in zip(beside.items(), results[count:], strict=True)
    }  # fmt: skip
    return results[:count]


def _serves_one(program: Program, prefill: Program) -> bool:
    """Whether the graph for any number of tokens is right for one, with a past and without."""
    if prefill.tokens[1] is not None:
        return False
    device = next(prefill.graph_module.parameters()).device
    for past in (5, 0):
        sizes = {"batch_size": 2, "past_sequence_length": past, "total_sequence_length": past + 1}
        generator = torch.Generator().manual_seed(0)
        inputs = [_example(spec, sizes, generator).to(device) for spec in program.inputs]
        for want, got in zip(program(*inputs), prefill(*inputs), strict=True):
            if not (want - got).abs().max() <= TOLERANCE * want.abs().max():
                return False
    return True


def _example(spec: TensorSpec, sizes: dict[str, int], generator: torch.Generator) -> torch.Tensor:
    shape = [sizes.get(size, 1) if isinstance(size, str) else size for size in spec.shape]
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(spec.dtype)
    if spec.role == "positions":
        return torch.full(shape, sizes["past_sequence_length"], dtype=spec.dtype)
    return torch.ones(shape, dtype=spec.dtype)


def _beside(b: Builder, program: Program, given: Values) -> dict[str, State]:
    """What layers keep beside keys and values, found by building a step for nothing."""
    if all(layer.format == "dense" for layer in program.cache.layers):
        return {}
    trial = b.inside()
    trial.functions, trial._made, trial._names = {}, {}, {}
    trial.weights = Weights({})
    step(trial, program, dict(given))
    return trial.presents


def _input(name: str, state: State) -> ir.Value:
    kind = ir.TensorType(DTYPES[state.dtype])
    return ir.Value(name=name, shape=ir.Shape(state.shape), type=kind)


def _rows(b: Builder, program: Program, given: Values) -> Made:
    """Row by row, for a graph of one row."""
    axes = [0, *(spec.shape.index("batch_size") for spec in program.cache.states)]
    ranks = [3, *(len(spec.shape) for spec in program.cache.states)]
    places = dict.fromkeys(TOKENS, 0) | dict(zip(_states(given), axes[1:], strict=True))

    def body(inner: Builder, row: ir.Value) -> Made:
        after = inner.op("Add", row, inner.constant([1]))
        own = {n: _part(inner, x, row, after, places[n]) for n, x in given.items()}
        made = _single(inner, program, own)
        return [inner.squeeze(x, axis) for x, axis in zip(made, axes, strict=True)]

    made = b.loop(b.size(given[IDS], 0), body, [])
    return [_moved(b, x, *place) for x, *place in zip(made, axes, ranks, strict=True)]


def _moved(b: Builder, x: ir.Value, axis: int, rank: int) -> ir.Value:
    """Its first dimension moved to axis."""
    order = list(range(1, rank))
    return b.transpose(x, *order[:axis], 0, *order[axis:]) if axis else x


def _pieces(b: Builder, program: Program, given: Values) -> Made:
    """In pieces of as many tokens as the prefill takes."""
    longest = program.prefill.tokens[1] if program.prefill is not None else None
    if longest is None:
        return _piece(b, program, given)
    count, most = b.size(given[IDS], 1), b.constant([longest])
    turns = b.op("Div", b.op("Add", count, b.constant([longest - 1])), most)

    def body(inner: Builder, turn: ir.Value, *states: ir.Value) -> Made:
        start = inner.op("Mul", turn, most)
        stop = inner.op("Min", inner.op("Add", start, most), count)
        logits, *after = _piece(inner, program, _cut(inner, given, start, stop, states))
        missing = Size(inner.op("Sub", most, inner.size(logits, 1)))
        sizes = [Size(inner.size(logits, 0)), missing, Size(inner.size(logits, 2))]
        zero = inner.op("CastLike", inner.constant(0), logits)
        rest = inner.op("Expand", zero, inner.numbers(sizes))
        return [*after, inner.op("Concat", logits, rest, axis=1)]

    *states, stacked = b.loop(turns, body, [given[name] for name in _states(given)])
    sizes = [Size(b.size(stacked, 1)), -1, Size(b.size(stacked, 3))]
    logits = b.reshape(b.transpose(stacked, 1, 0, 2, 3), sizes)
    return [b.slice(logits, 0, Size(count), 1), *states]


def _piece(b: Builder, program: Program, given: Values) -> Made:
    """At once by the prefill, or one by one where there is none or it takes no so few."""
    prefill = program.prefill
    if prefill is None:
        return _single(b, program, given)
    enough = b.op(
        *("GreaterOrEqual", b.squeeze(b.size(given[IDS], 1), 0), b.constant(prefill.tokens[0])),
        dtype=torch.bool,
    )
    return b.either(
        enough,
        lambda inner: _step(inner, prefill, given),
        lambda inner: _single(inner, program, given),
    )


def _single(b: Builder, program: Program, given: Values) -> Made:
    """One by one."""

    def body(inner: Builder, turn: ir.Value, *states: ir.Value) -> Made:
        after = inner.op("Add", turn, inner.constant([1]))
        logits, *made = _step(inner, program, _cut(inner, given, turn, after, states))
        return [*made, inner.squeeze(logits, 1)]

    states = [given[name] for name in _states(given)]
    *made, logits = b.loop(b.size(given[IDS], 1), body, states)
    return [b.transpose(logits, 1, 0, 2), *made]


def _step(b: Builder, program: Program, given: Values) -> Made:
    made = step(b, program, dict(given))
    return [*made, *(state.value for state in b.presents.values())]


def _cut(
    b: Builder, given: Values, start: ir.Value, stop: ir.Value, states: Sequence[ir.Value]
) -> Values:
    """What a step over the tokens from start to stop is given, with these states."""
    whole = b.size(given[IDS], 1)
    before = b.op("Sub", b.size(given[MASK], 1), whole)
    tokens = {name: _part(b, given[name], start, stop, 1) for name in (IDS, POSITIONS)}
    tokens[MASK] = _part(b, given[MASK], b.constant([0]), b.op("Add", before, stop), 1)
    return tokens | dict(zip(_states(given), states, strict=True))


def _part(b: Builder, x: ir.Value, start: ir.Value, stop: ir.Value, axis: int) -> ir.Value:
    made = b.slice(x, Size(start), Size(stop), axis)
    sizes = enumerate(x.shape or ())
    made.shape = ir.Shape([n if isinstance(n, int) and i != axis else None for i, n in sizes])
    return made


def _states(given: Values) -> list[str]:
    return [name for name in given if name not in TOKENS]
