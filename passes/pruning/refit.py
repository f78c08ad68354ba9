"""Layer by layer, front to back: what is kept learns to do what the dense layer did."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from regraft.passes.pruning.blocks import Block
from regraft.passes.pruning.mask_tuning import tuned
from regraft.passes.pruning.moments import Moments
from regraft.passes.pruning.reconstruct import refitted
from regraft.passes.pruning.samples import Sample
from regraft.passes.pruning.slicing import Cut, columns
from regraft.passes.recorder import Runner
from regraft.program import Program

log = logging.getLogger("regraft")
TOKENS = 49_152
"""The most tokens that least squares are fitted to."""
CHECKED = 8
"""One sample of so many decides which strength is best, and whether the fit helps at all."""
STRENGTHS = {"tune": (1e-3, 1e-2, 1e-1), "reconstruct": (1e-3, 1e-2, 1e-1, 1.0)}
LARGEST = 10.0
"""A mask beyond this is no solution."""


def refit(
    program: Program,
    blocks: Sequence[Block],
    kept: Sequence[Tensor],
    found: Sequence[Sample],
    tokens: Sequence[Sequence[Tensor]] | None,
    method: str,
    tell: Callable[[str], None],
) -> tuple[list[Cut], list[tuple[str, str]]]:
    """The cuts with tuned masks ("tune") or refitted weights ("reconstruct"), and why not.

    Each layer's aim is what the dense model has after it, residual included; what enters is what
    the layers before leave. Of ``tokens``, squared gradients [rows, length] of each sample and
    block, those that are 0 do not count, and for "reconstruct" each counts by its own: many
    parameters would else be spent on tokens that hardly matter. The model as it is and the one that
    is made run side by side, once.
    """
    chosen = _some(found)
    edits: dict[fx.Node, Any] = {}
    teachers, students = [], []
    for index in chosen:
        for runners, changes in ((teachers, {}), (students, edits)):
            runner = Runner(program, changes)
            runner.begin(*found[index].inputs)
            runners.append(runner)
    cuts, skipped = [], []
    every = min(CHECKED, len(chosen))
    for turn, (block, units) in enumerate(zip(blocks, kept, strict=True)):
        tell(f"{method} {turn + 1} of {len(blocks)}")
        fitted, check = Moments(), Moments()
        index_of = columns(block, units)
        for place, index in enumerate(chosen):
            real = found[index].real
            norms = None if tokens is None else tokens[index][turn]
            with torch.no_grad():
                x, y = _aim(block, teachers[place], students[place], index_of)
                x, y, weight = _counted(x, y, real, norms)
            weight = weight if method == "reconstruct" else None
            (check if place % every == every - 1 else fitted).add(x, y, weight)
        made, why = _fit(program, block, units, fitted, check, method)
        cuts.append(made)
        if why:
            skipped.append((block.name, why))
        edits[block.output] = _reading(index_of, *made.reading(program, block))
    if few := [(b, m) for b, m in skipped if "samples" in m]:
        log.warning("regraft: %s: %s", *few[0])
    return cuts, skipped


def _some(found: Sequence[Sample]) -> list[int]:
    """Samples evenly spread, of TOKENS together; at least one each to fit and to check."""
    sizes = [int(s.real.sum()) if s.real is not None else s.rows for s in found]
    share = min(1.0, TOKENS / max(sum(sizes), 1))
    count = min(len(found), max(round(share * len(found)), CHECKED))
    return sorted({i * len(found) // count for i in range(count)})


def _aim(block: Block, teacher: Runner, student: Runner, index: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer reads, of the units kept, and what it is to give."""
    dense, left = teacher.until(block.output), student.until(block.output)
    source: Any = block.output.args[0]
    y = F.linear(dense[source], *(dense[n] for n in block.output.args[1:] if n))
    if block.residual in dense and block.residual in left:
        y = y + (dense[block.residual] - left[block.residual])
    return left[source][..., index], y


def _counted(
    x: Tensor, y: Tensor, real: Tensor | None, norms: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tokens [n, features] that count, and by how much [n], in the mean 1."""
    x, y = (z[:, None] if z.dim() == 2 else z.flatten(1, -2) for z in (x, y))
    seen = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if real is not None and real.shape == seen.shape:
        seen = seen & real
    if norms is None or norms.shape != seen.shape:
        return x[seen], y[seen], None
    seen = seen & (norms > 0)
    weight = norms[seen]
    return x[seen], y[seen], weight / weight.mean()


def _reading(index: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[..., tuple]:
    return lambda x, *_: (x[..., index], weight, bias)


def _fit(
    program: Program, block: Block, units: Tensor, fitted: Moments, check: Moments, method: str
) -> tuple[Cut, str]:
    """The cut of least error on the samples set apart, and why it is not the fit's."""
    whole = Cut(units)
    weight, bias = whole.reading(program, block)
    if not len(units):
        if method == "reconstruct" and fitted.rows:
            mean = (fitted + check).y / (fitted.rows + check.rows)
            return Cut(units, None, weight, mean.float()), ""
        return whole, ""
    if not fitted.rows or not check.rows:
        return whole, "too few samples: none to fit to or none to check with"
    width = block.width // block.parts

    def made(moments: Moments, strength: float) -> Cut:
        if method == "reconstruct":
            return Cut(units, None, *refitted(moments, weight, strength))
        return Cut(units, tuned(moments, weight, bias, width, strength))

    best, least = None, check.error(weight, bias)
    for strength in STRENGTHS[method]:
        try:
            error = check.error(*made(fitted, strength).reading(program, block))
        except ArithmeticError:
            continue
        if error < least:
            best, least = strength, error
    if method == "reconstruct":
        rank, unknowns = fitted.rows, len(units) * block.width
    else:
        rank, unknowns = fitted.rows * len(weight), len(units) * block.parts
    why = f"too few samples: rank {rank} for {unknowns} unknowns" if rank < unknowns else ""
    if best is None:
        return whole, why or "no fit lowers its error"
    result = made(fitted + check, best)
    if result.scale is not None and result.scale.abs().max() > LARGEST:
        return whole, f"a mask is {result.scale.abs().max():.0f}, beyond {LARGEST:.0f}"
    return result, why
