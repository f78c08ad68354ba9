"""Calibration batches as inputs of a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regraft.passes.calibrate import pieces
from regraft.passes.recorder import prompt_inputs
from regraft.program import Program, RegraftError

DECODER = {"ids", "mask", "positions", "cache"}


@dataclass(frozen=True, eq=False)
class Sample:
    """Inputs of the program, the tokens that are no padding (bool [rows, length], None for all),
    and labels, if any: int64 or float [rows, ...]."""

    inputs: tuple[Tensor, ...]
    real: Tensor | None = None
    labels: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.inputs[0].shape[0]


def is_decoder(program: Program) -> bool:
    roles = {spec.role for spec in program.inputs}
    return "cache" in roles and roles <= DECODER


def samples(program: Program, calibration: Sequence[Any], limit: int, seed: int) -> list[Sample]:
    """Batches as inputs of the program, of at most ``limit`` rows, chosen by ``seed``.

    A decoder takes batches of token ids (rows of at most 512 tokens); any other program dicts of
    its inputs by name, perhaps with "labels"; attention_mask and token_type_ids may be left out.
    RegraftError where an input is missing or does not fit.
    """
    if not calibration:
        raise RegraftError("Prune needs calibration=: batches of inputs, some 2,000 rows")
    device = program.examples[0].device if program.examples else torch.device("cpu")
    if is_decoder(program):
        found = [_decoder_sample(program, ids.to(device)) for ids in pieces(calibration, None)]
    else:
        found = [_sample(program, batch, device) for batch in calibration]
    total = sum(sample.rows for sample in found)
    if total <= limit:
        return found
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.randperm(total, generator=generator)[:limit]] = True
    chosen = chosen.to(device)
    parts = zip(found, chosen.split([sample.rows for sample in found]), strict=True)
    return [_trimmed(_rows_of(sample, mask)) for sample, mask in parts if mask.any()]


def mean_length(found: Sequence[Sample], default: float) -> float:
    """Tokens of a row, padding left out."""
    if any(sample.real is None for sample in found):
        return default
    tokens = sum(int(sample.real.sum()) for sample in found if sample.real is not None)
    return tokens / sum(sample.rows for sample in found)


def _sample(program: Program, batch: Any, device: torch.device) -> Sample:
    names = [spec.name for spec in program.inputs]
    if torch.is_tensor(batch) and len(names) == 1:
        batch = {names[0]: batch}
    if not isinstance(batch, Mapping) and not hasattr(batch, "keys"):
        raise RegraftError(f"calibration takes dicts of inputs: {', '.join(names)}")
    ids = batch.get("input_ids") if hasattr(batch, "get") else None
    given = []
    for spec in program.inputs:
        value = batch.get(spec.name)
        if value is None and torch.is_tensor(ids) and spec.name.startswith(("attent", "token_t")):
            value = torch.full_like(ids, int(spec.name == "attention_mask"))
        if not torch.is_tensor(value):
            raise RegraftError(f"calibration lacks the input {spec.name}, or it is no tensor")
        sizes = zip(value.shape, spec.shape, strict=False)
        wrong = any(isinstance(known, int) and size != known for size, known in sizes)
        if value.dtype != spec.dtype or value.dim() != len(spec.shape) or wrong:
            raise RegraftError(
                f"calibration's {spec.name} is {value.dtype} {list(value.shape)}, the model takes "
                f"{spec.dtype} [{', '.join(map(str, spec.shape))}]"
            )
        given.append(value.to(device))
    mask = dict(zip(names, given, strict=True)).get("attention_mask")
    real = None if mask is None or mask.dim() != 2 else mask.bool()
    labels = batch.get("labels")
    return Sample(tuple(given), real, None if labels is None else labels.to(device))


def _decoder_sample(program: Program, ids: Tensor) -> Sample:
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
    return Sample(prompt_inputs(program, ids), torch.ones_like(ids, dtype=torch.bool), labels)


def _rows_of(sample: Sample, mask: Tensor) -> Sample:
    rows = sample.rows

    def some(x: Tensor | None) -> Tensor | None:
        return x[mask] if x is not None and x.shape[:1] == (rows,) else x

    inputs = tuple(some(x) for x in sample.inputs)
    return Sample(inputs, some(sample.real), some(sample.labels))  # type: ignore[arg-type]


def _trimmed(sample: Sample) -> Sample:
    """Without columns that are padding in every row."""
    if sample.real is None or (seen := sample.real.any(0)).all():
        return sample
    length = len(seen)
    inputs = tuple(x[:, seen] if x.dim() > 1 and x.shape[1] == length else x for x in sample.inputs)
    return Sample(inputs, sample.real[:, seen], sample.labels)
