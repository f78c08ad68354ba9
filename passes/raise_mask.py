"""Masks that a model computes by hand become the one operator that the runtime knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from regraft.kernels.ops import causal_mask
from regraft.passes.base import Context, Pass, PassResult, is_call
from regraft.passes.regions import ancestors, evaluate
from regraft.passes.sizes import Sizes
from regraft.program import Program
from regraft.program.program import source_of

aten = torch.ops.aten
regraft = torch.ops.regraft
ROLES = {"ids", "mask", "positions", "cache"}
LONGEST, PADDING = 2**17, 2
HIDDEN = -1e4
"""Biases below this hide a key."""


@dataclass(frozen=True)
class RaiseMask(Pass):
    """attention(q, k, v, m) -> attention(q, k, v, causal_mask(padding, window))    exact

    m is a mask, or a bias of 0 and less than -1e4, that lets tokens see what a causal mask lets
    them see, all of it or a sliding window, padding hidden or not. It is recognised by what it
    computes for a padded prompt, a token behind padding and tokens behind 131072 others (or as
    many as the graph serves). What rows of padding see is left open: nothing reads them.
    """

    def apply(self, program: Program, context: Context) -> PassResult:
        if {spec.role for spec in program.inputs} - ROLES:
            return PassResult(0)
        matches, skipped = 0, []
        found: dict[fx.Node, fx.Node | None] = {}
        finder: _Masks | None = None
        for node in program.graph.find_nodes(op="call_function", target=regraft.attention.default):
            mask = node.args[3]
            if not isinstance(mask, fx.Node) or is_call(mask, regraft.causal_mask.default):
                continue
            finder = finder or _Masks(program)
            if mask not in found:
                found[mask] = finder.raised(mask)
            raised = found[mask]
            if raised is None:
                skipped.append((source_of(node), "its mask is more than causal"))
                continue
            node.args = (*node.args[:3], raised, *node.args[4:])
            matches += 1
        return PassResult(matches, tuple(skipped))


class _Masks:
    def __init__(self, program: Program) -> None:
        self.program, self.sizes = program, Sizes(program)
        self.placeholders = program.graph.find_nodes(op="placeholder")
        self.place = {s.name: n for n, s in zip(self.placeholders, program.inputs, strict=True)}
        longest = min(LONGEST, (program.context or LONGEST) - 4)
        cases = (2, 5, 0, 0), (2, 1, 9, 3), (1, 2, longest, 0)
        self.cases = [self._case(*sizes) for sizes in cases]
        self.made: dict[tuple[int, bool], fx.Node] = {}

    def _case(self, batch: int, queries: int, past: int, first: int) -> dict[fx.Node, Any]:
        """Inputs whose first row has tokens of padding from ``first`` on."""
        total = past + queries
        mask = torch.ones(batch, total, dtype=torch.long)
        mask[0, first : first + PADDING] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -queries:]
        named = {"attention_mask": mask, "position_ids": positions}
        sizes = {"batch_size": batch, "sequence_length": queries, "kept": queries,
                 "past_sequence_length": past, "total_sequence_length": total}  # fmt: skip
        values: dict[fx.Node, Any] = {}
        for node, spec in zip(self.placeholders, self.program.inputs, strict=True):
            shape = [sizes[n] if isinstance(n, str) else n for n in spec.shape]
            device = self.program.examples[0].device
            zeros = torch.zeros((), dtype=spec.dtype, device=device).expand(shape)
            given = named.get(spec.name)
            values[node] = zeros if given is None else given.to(device, spec.dtype)
        return values

    def raised(self, mask: fx.Node) -> fx.Node | None:
        """The causal mask that tokens see alike; None where there is none."""
        before = {*ancestors(mask), mask}
        for node, spec in zip(self.placeholders, self.program.inputs, strict=True):
            read = {user for user in node.users if user in before}
            if spec.role in ("ids", "cache") and any(u.target != aten.sym_size.int for u in read):
                return None
        try:
            seen = [_seen(evaluate(self.program, mask, values)) for values in self.cases]
        except (RuntimeError, IndexError, ValueError):
            return None
        last = seen[-1]
        if any(one is None for one in seen) or last is None:
            return None
        count, keys = int(last[0, 0, -1].sum()), last.shape[-1]
        window = count if count < keys - PADDING else 0
        for padded in (True, False):
            if all(
                self._same(*pair, window, padded) for pair in zip(self.cases, seen, strict=True)
            ):
                return self._node(window, padded)
        return None

    def _same(self, values: dict[fx.Node, Any], seen: Any, window: int, padded: bool) -> bool:
        padding: Tensor = values[self.place["attention_mask"]]
        queries, total = values[self.place["input_ids"]].shape[1], padding.shape[1]
        batch, shown = len(padding), padding if padded else None
        wanted = causal_mask(shown, queries, total, total - queries, window, batch)
        if len(seen) not in (1, batch) or seen.shape[2:] != wanted.shape[2:]:
            return False
        real = padding[:, -queries:].bool()
        rows = seen.expand(batch, -1, -1, -1).transpose(1, 2)[real]
        return torch.equal(rows, wanted.transpose(1, 2)[real].expand_as(rows))

    def _node(self, window: int, padded: bool) -> fx.Node:
        key = window, padded
        if key not in self.made:
            ids, past = self.placeholders[0].meta["val"], self.placeholders[-1].meta["val"]
            shape = ids.shape[0], 1, ids.shape[1], past.shape[2] + ids.shape[1]
            batch, _, queries, keys = (self.sizes.of(n) for n in shape)
            offset = self.sizes.of(past.shape[2])
            padding = self.place["attention_mask"] if padded else None
            graph = self.program.graph
            with graph.inserting_after(self.sizes.anchor):
                node = graph.call_function(
                    regraft.causal_mask.default, (padding, queries, keys, offset, window, batch)
                )
            node.meta["val"] = ids.new_empty(shape, dtype=torch.bool)
            self.made[key] = node
        return self.made[key]


def _seen(mask: Tensor) -> Tensor | None:
    """Which keys a mask [batch, heads, queries, keys] shows; None where it is a bias."""
    if mask.dim() != 4 or mask.dtype == torch.bool:
        return mask if mask.dim() == 4 else None
    shown = mask > HIDDEN
    return None if mask[shown].any() else shown
