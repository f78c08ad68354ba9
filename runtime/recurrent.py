"""States of constant size that each step replaces, with the last steps kept for taking back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regraft.program import TensorSpec

TOKENS = "past_sequence_length"


class RecurrentStates:
    """The recurrent states of one generation: convolutions, state spaces, linear attention.

    A step never writes into a state but makes new ones, so earlier states are kept by reference:
    those after each of the last ``rollback`` steps. A state with a row for each token (the keys of
    an indexer) grows instead; where all do, any length can be taken back. specs give
    names, shapes and dtypes.
    """

    def __init__(self, specs: Sequence[TensorSpec], rollback: int = 8) -> None:
        self.specs, self.rollback = tuple(specs), rollback
        self._steps: list[tuple[int, list[Tensor]]] = []

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self._steps[-1][0] if self._steps else 0

    @property
    def batch(self) -> int:
        if self._steps:
            for spec, state in zip(self.specs, self._steps[-1][1], strict=True):
                if "batch_size" in spec.shape:
                    return state.shape[spec.shape.index("batch_size")]
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes of all states, earlier steps included."""
        tensors = {id(state): state.nbytes for _, states in self._steps for state in states}
        return sum(tensors.values())

    def read(self, rows: int, device: torch.device) -> list[Tensor]:
        """The states after the last token; zeros for this many rows before the first."""
        if self._steps:
            return self._steps[-1][1]
        sizes: dict[Any, Any] = {"batch_size": rows, "past_sequence_length": 0}
        return [
            torch.zeros([sizes.get(n, n) for n in spec.shape], dtype=spec.dtype, device=device)
            for spec in self.specs
        ]

    def append(self, states: Sequence[Tensor], count: int) -> None:
        """Replace the states after a step of count tokens."""
        owned = [_compact(state) for state in states]
        self._steps = [*self._steps[-self.rollback :], (self.length + count, owned)]

    def split(self, rows: int) -> list[RecurrentStates]:
        """The states after the last token, each row on its own."""
        made = []
        for row in range(rows):
            alone = RecurrentStates(self.specs, 0)
            if self._steps:
                length, states = self._steps[-1]
                pairs = zip(self.specs, states, strict=True)
                alone._steps = [(length, [_select(*p, torch.tensor([row])) for p in pairs])]
            made.append(alone)
        return made

    def join(self, rows: Sequence[RecurrentStates], count: int) -> None:
        """Replace the states after a step of count tokens that each row took on its own."""
        parts = zip(*(row._steps[-1][1] for row in rows), strict=True)
        joined = [
            torch.cat(part, spec.shape.index("batch_size"))
            if "batch_size" in spec.shape
            else part[0]
            for spec, part in zip(self.specs, parts, strict=True)
        ]
        self.append(joined, count)

    def check(self, length: int) -> None:
        """Raise ValueError when truncate could not go back to this length."""
        if growing(self.specs):
            return
        kept = [step for step, _ in self._steps]
        if length and length not in kept:
            raise ValueError(
                f"cannot truncate to {length}: recurrent states are kept for lengths "
                f"{', '.join(map(str, kept)) or '0'}; truncate to one of these, or to 0 and "
                "run the tokens again"
            )

    def truncate(self, length: int) -> None:
        self.check(length)
        steps = [step for step in self._steps if 0 < step[0] <= length]
        if length and growing(self.specs) and self.length != length:
            states = zip(self.specs, self._steps[-1][1], strict=True)
            cut = [s.narrow(spec.shape.index(TOKENS), 0, length) for spec, s in states]
            steps.append((length, cut))
        self._steps = steps

    def reorder(self, index: Tensor) -> None:
        self._steps = [
            (length, [_select(*pair, index) for pair in zip(self.specs, states, strict=True)])
            for length, states in self._steps
        ]

    def reset(self) -> None:
        self._steps = []


def growing(specs: Sequence[TensorSpec]) -> bool:
    """Whether every state has a row for each token, so that any length can be cut from it."""
    return all(TOKENS in spec.shape for spec in specs)


def _compact(state: Tensor) -> Tensor:
    """A copy where the state is a small view of a large tensor."""
    return state.clone() if state.untyped_storage().nbytes() > 2 * state.nbytes else state


def _select(spec: TensorSpec, state: Tensor, index: Tensor) -> Tensor:
    if "batch_size" not in spec.shape:
        return state
    return state.index_select(spec.shape.index("batch_size"), index.to(state.device))
