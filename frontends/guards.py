"""What a trace assumed of the sizes it met, as a limit on the length of the context."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import Tensor

from regraft.program import TensorSpec

LONGEST = 2**20


def longest_context(
    inputs: Sequence[TensorSpec], fakes: Sequence[Tensor], at_once: bool = True
) -> int | None:
    """The most tokens, past ones included, that keep every assumption true; None: any number.

    at_once: whether they may also come in one call, rather than a few after many.
    ``min(topk, tokens)`` in a model's Python, say, is traced as one of the two.
    """
    sizes: dict[sympy.Symbol, tuple[int | str, int]] = {}
    for spec, fake in zip(inputs, fakes, strict=True):
        for name, size in zip(spec.shape, fake.shape, strict=True):
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                sizes[size.node.expr] = (name, size.node.hint)
    hints = dict(sizes.values())
    if "past_sequence_length" not in hints:
        return None
    past, queries = hints["past_sequence_length"], hints.get("sequence_length", 1)
    environment = next(f.fake_mode.shape_env for f in fakes)  # type: ignore[attr-defined]
    guards = [g.expr for g in environment.guards if g.expr.free_symbols <= set(sizes)]

    def holds(total: int) -> bool:
        ways = [(total - queries, queries)]
        if at_once and "sequence_length" in hints:
            ways.append((past, total - past))
        for before, new in ways:
            now = {**hints, "past_sequence_length": before, "sequence_length": new,
                   "total_sequence_length": total}  # fmt: skip
            values = {s: sympy.Integer(now.get(name, hint)) for s, (name, hint) in sizes.items()}
            if any(guard.xreplace(values) == sympy.false for guard in guards):
                return False
        return True

    low, high = past + queries, 2 * (past + queries)
    while high <= LONGEST and holds(high):
        low, high = high, 2 * high
    if high > LONGEST:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
