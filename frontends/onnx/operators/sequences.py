"""Sequences (lists) and optionals (a value or None)."""

from __future__ import annotations

import torch

from regraft.frontends.onnx.registry import operator
from regraft.frontends.onnx.values import as_numbers, host


@operator("SequenceEmpty")
def sequence_empty(*, dtype=1):
    return []


@operator("SequenceConstruct")
def sequence_construct(*inputs):
    return list(inputs)


@operator("SequenceAt", host=(1,))
def sequence_at(sequence, position):
    return sequence[position[0]]


@operator("SequenceInsert", host=(2,))
def sequence_insert(sequence, value, position=None):
    place = len(sequence) if position is None else position[0]
    place = place + len(sequence) if place < 0 else place
    return [*sequence[:place], value, *sequence[place:]]


@operator("SequenceErase", host=(1,))
def sequence_erase(sequence, position=None):
    place = (-1 if position is None else position[0]) % len(sequence)
    return [*sequence[:place], *sequence[place + 1 :]]


@operator("SequenceLength")
def sequence_length(sequence):
    return host(len(sequence))


@operator("SequenceMap")
def sequence_map(first, *others, body, outputs):
    rows: list[list] = [[] for _ in range(outputs)]
    for index, item in enumerate(first):
        results = body(item, *(x[index] if isinstance(x, list) else x for x in others))
        for row, value in zip(rows, results, strict=True):
            row.append(value)
    return tuple(rows)


@operator("ConcatFromSequence")
def concat_from_sequence(sequence, *, axis, new_axis=0):
    return torch.stack(sequence, axis) if new_axis else torch.cat(sequence, axis)


@operator("SplitToSequence", raw=True)
def split_to_sequence(x, split=None, *, axis=0, keepdims=1):
    if split is None:
        parts = list(x.split(1, axis))
        return [p.squeeze(axis) for p in parts] if not keepdims else parts
    sizes = as_numbers(split)
    return list(x.split(sizes if len(split.shape) else sizes[0], axis))


@operator("Optional")
def optional(x=None, *, type=None):
    return x


@operator("OptionalGetElement")
def optional_get_element(x):
    if x is None:
        raise ValueError("the optional is empty")
    return x


@operator("OptionalHasElement")
def optional_has_element(x=None):
    return host(x is not None, torch.bool)
