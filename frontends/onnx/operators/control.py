"""If, Loop and Scan, and the sequences that SequenceMap maps."""

from __future__ import annotations

from typing import Any

import torch

from regraft.frontends.onnx.registry import operator
from regraft.frontends.onnx.values import as_numbers, as_tensor, host


@operator("If", raw=True)
def if_(condition, *, then_branch, else_branch):
    return then_branch() if as_numbers(condition)[0] else else_branch()


@operator("Loop", raw=True)
def loop(count, condition, *carried, body, outputs):
    limit = None if count is None else as_numbers(count)[0]
    states: list[Any] = list(carried)
    rows: list[list[Any]] = [[] for _ in range(outputs - len(states))]
    going = condition is None or as_numbers(condition)[0]
    turn = 0
    while going and (limit is None or turn < limit):
        condition, *results = body(host(turn), host(True, torch.bool), *states)
        states = results[: len(states)]
        for row, value in zip(rows, results[len(states) :], strict=True):
            row.append(as_tensor(value))
        going = as_numbers(condition)[0]
        turn += 1
    return (*states, *(torch.stack(row) if row else torch.zeros(0) for row in rows))


@operator("Scan", since=9)
def scan(
    *inputs, body, num_scan_inputs, scan_input_axes=None, scan_input_directions=None,
    scan_output_axes=None, scan_output_directions=None, outputs,
):  # fmt: skip
    split = len(inputs) - num_scan_inputs
    states, scanned = list(inputs[:split]), inputs[split:]
    axes = scan_input_axes or [0] * num_scan_inputs
    backwards = scan_input_directions or [0] * num_scan_inputs
    columns = [
        list(reversed(x.unbind(axis))) if back else list(x.unbind(axis))
        for x, axis, back in zip(scanned, axes, backwards, strict=True)
    ]
    rows: list[list[Any]] = [[] for _ in range(outputs - split)]
    for parts in zip(*columns, strict=True):
        results = [as_tensor(value) for value in body(*states, *parts)]
        states = results[:split]
        for row, value in zip(rows, results[split:], strict=True):
            row.append(value)
    axes = scan_output_axes or [0] * len(rows)
    backwards = scan_output_directions or [0] * len(rows)
    made = [
        torch.stack(row[::-1] if back else row, axis)
        for row, axis, back in zip(rows, axes, backwards, strict=True)
    ]
    return (*states, *made)


@operator("Scan", since=8)
def scan_8(lengths, *inputs, body, num_scan_inputs, directions=None, outputs):
    batches = []
    for index in range(inputs[0].shape[0]):
        count = None if lengths is None else int(lengths[index])
        split = len(inputs) - num_scan_inputs
        parts = [x[index] if i < split else x[index][:count] for i, x in enumerate(inputs)]
        batches.append(
            scan(*parts, body=body, num_scan_inputs=num_scan_inputs,
                 scan_input_directions=directions, outputs=outputs)
        )  # fmt: skip
    return tuple(torch.stack(values) for values in zip(*batches, strict=True))
