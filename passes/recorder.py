"""Runs a program's graph on token batches to see, change and differentiate what is in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from regraft.kernels.ops import bodies, causal_mask
from regraft.program import Program

regraft = torch.ops.regraft
Edit = Callable[..., tuple[Any, ...]]
Loss = Callable[[Tensor], Tensor]
_ATTENTION = (regraft.cached_attention.default, regraft.attention.default)


class Runner(fx.Interpreter):
    """Calls a program's graph with some nodes' arguments edited; autograd can follow it.

    edits[node] takes the node's arguments and returns those to use. Weights take no gradients.
    """

    def __init__(self, program: Program, edits: Mapping[fx.Node, Edit]) -> None:
        super().__init__(program.graph_module)
        self.program, self.edits = program, edits
        self._todo: Iterator[fx.Node] = iter(())

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            return super().run_node(n).detach()
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n in self.edits:
            args = self.edits[n](*args)
        if n.target is regraft.causal_mask.default and all(u.target in _ATTENTION for u in n.users):
            return _mask(*args)
        return bodies.get(n.target, n.target)(*args, **kwargs)

    def begin(self, *inputs: Any) -> None:
        """Be ready to run on inputs, as far as ``until`` says."""
        self.args_iter = iter(inputs)
        self.env, self._todo = {}, iter(self.program.graph.nodes)

    def until(self, stop: fx.Node) -> dict[fx.Node, Any]:
        """Run up to ``stop``, it alone left out; the values that it or later nodes need."""
        for node in self._todo:
            if node is stop:
                self._todo = itertools.chain((node,), self._todo)
                break
            self.env[node] = self.run_node(node)
            for dead in self.user_to_last_uses.get(node, ()):
                self.env.pop(dead, None)
        return self.env

    def logits(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """[batch, kept, vocab] after the tokens at keep, or at all places, of ids [batch, length],
        which begin their sequences."""
        return self.run(*prompt_inputs(self.program, ids, keep))[0]


def prompt_inputs(program: Program, ids: Tensor, keep: Tensor | None = None) -> tuple[Tensor, ...]:
    """A decoder's inputs for ids [batch, length] behind an empty cache; keep: the places [kept]
    whose logits are wanted, None for all."""
    batch, length = ids.shape
    places = torch.arange(length, device=ids.device)
    known = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": places.expand(batch, -1),
        "logits_to_keep": places if keep is None else keep,
    }
    sizes: dict[Any, Any] = {"batch_size": batch, "past_sequence_length": 0}
    for spec in program.inputs:
        if spec.name not in known:
            shape = [sizes.get(n, n) for n in spec.shape]
            known[spec.name] = torch.zeros(shape, dtype=spec.dtype, device=ids.device)
    return tuple(known[spec.name] for spec in program.inputs)


def _mask(_padding: Any, queries: int, keys: int, offset: int, window: int, batch: int) -> Any:
    """The mask without padding; None where attention is causal anyway."""
    if not window or keys <= window:
        return None
    return causal_mask(None, queries, keys, offset, window, batch)


def record(
    program: Program, places: Mapping[fx.Node, Sequence[int]], ids: Tensor, gradients: bool
) -> dict[fx.Node, list[tuple[Tensor, Tensor | None]]]:
    """The arguments of nodes at these places while ids [1, length] run, and their gradients.

    gradients: those of the language model's loss, the sum over ids of the negative
    log-likelihood of each next token; else None, and no logits are computed.
    """
    seen: dict[fx.Node, list[Tensor]] = {}

    def watch(node: fx.Node, *args: Any) -> tuple[Any, ...]:
        given = list(args)
        for place in places[node]:
            if gradients:
                x = args[place]
                given[place] = x if x.requires_grad else x.detach().requires_grad_()
                given[place].retain_grad()
        seen[node] = [given[place] for place in places[node]]
        return tuple(given)

    edits = {node: (lambda *args, node=node: watch(node, *args)) for node in places}
    runner = Runner(program, edits)
    if gradients:
        with torch.enable_grad():
            logits = runner.logits(ids)
            F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum").backward()
    else:
        with torch.no_grad():
            runner.logits(ids, torch.zeros(0, dtype=torch.long, device=ids.device))
    return {node: [(x.detach(), x.grad) for x in found] for node, found in seen.items()}
