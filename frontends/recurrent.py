"""Hugging Face causal language models whose layers carry states of constant size.

Such models run other code for one token than for many, so their Program has two graphs: one token
with states (the program itself) and several tokens with states (its ``prefill``), where the model
can do that at all. Before the first token every state is zero. None of this is taken on trust:
each way of running the model is tried against the model itself on a padded batch first.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor
from torch.utils._sympy.printers import PythonPrinter
from transformers import PreTrainedModel

from regraft.frontends.functional import functionalize
from regraft.frontends.guards import longest_context
from regraft.frontends.states import Memory
from regraft.frontends.tracing import trace
from regraft.program import CacheSpec, LayerState, Program, RegraftError, TensorSpec

ROWS, PAST, QUERIES, PADDING = 2, 7, 3, 2
LONGEST = 4096
TOLERANCE = 1e-5
GAIN = 0.5  # most operators of a prefill, as a share of those of its tokens one by one


class RecurrentStep(torch.nn.Module):
    """One call of the model as a function of ids, mask, positions, keys, values and states.

    apart: each row in a call of its own, for models that mix rows when they get one token.
    masked: whether the model gets the attention mask. frozen: a token that the mask excludes
    leaves the states as they were, which a model ensures for many tokens but not for one.
    """

    def __init__(
        self, model: PreTrainedModel, memory: Memory, masked: bool, frozen: bool, apart: bool
    ) -> None:
        super().__init__()
        self.model, self.memory, self.masked, self.frozen = model, memory, masked, frozen
        self.apart = apart
        self.accepted = set(inspect.signature(model.forward).parameters)

    def forward(self, input_ids, attention_mask, position_ids, logits_to_keep, *past):
        if self.apart and input_ids.shape[0] > 1:
            rows = []
            for row in range(input_ids.shape[0]):
                part = slice(row, row + 1)
                given = (input_ids[part], attention_mask[part], position_ids[part])
                rows.append(self(*given, logits_to_keep, *self.memory.row(past, row)))
            logits, *states = zip(*rows, strict=True)
            return torch.cat(logits), *self.memory.join(states)
        keeps = "logits_to_keep" in self.accepted
        extra = {"logits_to_keep": logits_to_keep} if keeps else {}
        if self.masked:
            extra["attention_mask"] = attention_mask
        if "position_ids" in self.accepted:
            extra["position_ids"] = position_ids
        given = self.memory.give(past)
        extra |= self.memory.arguments(given)
        output = self.model(input_ids=input_ids, use_cache=True, **extra)
        states = self.memory.take(given, output)
        if self.frozen:
            first = 2 * len(self.memory.keys)
            pairs = zip(states[first:], past[first:], self.memory.states, strict=True)
            kept = [_where(attention_mask[:, -1], new, old, spec[1]) for new, old, spec in pairs]
            states = states[:first] + kept
        logits = output.logits if keeps else output.logits[:, logits_to_keep]
        return logits, *states


def _where(seen: Tensor, new: Tensor, old: Tensor, shape: tuple[int | str, ...]) -> Tensor:
    if "batch_size" not in shape or "past_sequence_length" in shape:
        return new
    rows = seen.bool().view([-1 if size == "batch_size" else 1 for size in shape])
    return torch.where(rows, new, old)


class Trial:
    """A padded prompt, what the model computes for it, and whether a step computes the same."""

    def __init__(self, model: PreTrainedModel) -> None:
        limit = model.config.get_text_config(decoder=True).vocab_size
        length = PAST + QUERIES
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, max(4, limit), (ROWS, length), generator=generator)
        self.ids = ids.to(model.device)
        self.mask = torch.ones_like(self.ids)
        self.mask[0, :PADDING] = 0
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        accepted = inspect.signature(model.forward).parameters
        extra = {"position_ids": self.positions} if "position_ids" in accepted else {}
        was_training = model.training
        model.eval()
        output = model(input_ids=self.ids, attention_mask=self.mask, use_cache=False, **extra)
        model.train(was_training)
        self.logits = output.logits

    def inputs(self, start: int, stop: int, kept: int) -> list[Tensor]:
        keep = torch.arange(kept, device=self.ids.device) % (stop - start)
        ids, positions = self.ids[:, start:stop], self.positions[:, start:stop]
        return [ids, self.mask[:, :stop], positions, keep]

    def error(self, step: RecurrentStep, sizes: list[int]) -> tuple[float, list[Tensor]]:
        """Largest difference of the logits as a share of their scale; the states after PAST."""
        states, start, worst = step.memory.zeros(ROWS), 0, 0.0
        after = states
        for size in sizes:
            stop = start + size
            logits, *states = step(*self.inputs(start, stop, size), *states)
            real = self.mask[:, start:stop].bool()
            difference = (logits - self.logits[:, start:stop])[real].abs().max().item()
            worst = difference if not difference <= worst else worst
            start = stop
            after = states if stop == PAST else after
        return worst / self.logits.abs().max().item(), after


def capture_recurrent(model: PreTrainedModel, trial: Trial) -> Program:
    """Program of one token with its states; ``prefill`` takes several where the model can.

    Inputs and outputs as in ``capture``, and each state past_key_values.{name} and
    present.{name}, such as past_key_values.0.conv_state. metadata["prefill"] says why there is
    none. trial was made with the model's own attention.
    """
    memory = Memory(model)
    try:
        if not memory.states:
            raise RegraftError(
                f"{type(model).__name__} keeps no cache that transformers hands from call to "
                "call: it cannot be compiled as a cached decoder"
            )
        step, states = _choose(trial, memory, [1] * (PAST + 1), (True, False), 10)
        if isinstance(step, str):
            raise RegraftError(
                f"{type(model).__name__} token by token from empty states differs from the whole "
                f"prompt at once ({step}): its states are not understood"
            )
        program = _program(trial, step, 1, states)
        if step.apart:
            program.metadata["prefill"] = "it mixes the rows of a batch"
            return program
        many, _ = _choose(trial, memory, [4, PAST + QUERIES - 4], (False,), 1)
        if isinstance(many, str):
            program.metadata["prefill"] = many
            return program
        try:
            prefill = _program(trial, many, QUERIES, states)
        except RegraftError as error:
            program.metadata["prefill"] = str(error)
            return program
        single, several = (len(part.graph.nodes) for part in (program, prefill))
        if several > GAIN * single * (prefill.tokens[1] or LONGEST):
            program.metadata["prefill"] = f"{several} operators, token by token {single}"
        else:
            program.prefill = prefill
        return program
    finally:
        memory.restore()


def _choose(
    trial: Trial, memory: Memory, sizes: list[int], freezing: tuple[bool, ...], slack: float
) -> tuple[RecurrentStep | str, list[Tensor]]:
    """A way of running the model that agrees with it, with its states, or why none agrees.

    The first within the tolerance, else the best within slack times as much.
    """
    tolerance = max(TOLERANCE, 8 * torch.finfo(memory.model.dtype).eps)
    best: tuple[float, RecurrentStep | str, list[Tensor]] = (slack * tolerance, "", [])
    reasons = []
    apart = (False,) if memory.keys else (False, True)
    for alone, masked, frozen in product(apart, (True, False), freezing):
        step = RecurrentStep(memory.model, memory, masked, frozen, alone)
        try:
            error, states = trial.error(step, sizes)
        except (RuntimeError, ValueError, IndexError, TypeError) as failure:
            reasons.append(f"{type(failure).__name__}: {str(failure).splitlines()[0]}")
            continue
        reasons.append(f"logits differ by {error:.1e} of their scale")
        if error <= best[0]:
            best = (error, step, states)
        if error <= tolerance:
            break
    return best[1] or min(reasons, key=len), best[2]


def _program(trial: Trial, step: RecurrentStep, size: int, states: list[Tensor]) -> Program:
    memory = step.memory
    rows = ("batch_size", "sequence_length" if size > 1 else 1)
    total = ("batch_size", "total_sequence_length")
    inputs = [
        TensorSpec("input_ids", rows, torch.long, "ids"),
        TensorSpec("attention_mask", total, torch.long, "mask"),
        TensorSpec("position_ids", rows, torch.long, "positions"),
        TensorSpec("logits_to_keep", ("kept",), torch.long, "positions"),
    ]
    outputs = [TensorSpec("logits", ("batch_size", "kept", "vocab"), step.model.dtype, "logits")]
    kept = 5
    examples = [*trial.inputs(PAST, PAST + size, kept), *states]
    many = (0, 1) if size > 1 else (0,)
    dynamic: list[tuple[int, ...]] = [many, (0, 1), many, (0,)]
    for index, *pair in memory.keys:
        for kind, state in zip(("key", "value"), pair, strict=True):
            shape: tuple[int | str, ...]
            for specs, prefix, length in ((inputs, "past_key_values", "past_sequence_length"),
                                          (outputs, "present", total[1])):  # fmt: skip
                shape = ("batch_size", state.shape[1], length, state.shape[3])
                specs.append(TensorSpec(f"{prefix}.{index}.{kind}", shape, state.dtype, "cache"))
            dynamic.append((0, 2))
    recurrent = []
    for name, shape, dtype in memory.states:
        recurrent.append(TensorSpec(f"past_key_values.{name}", shape, dtype, "state"))
        after = tuple(total[1] if size == "past_sequence_length" else size for size in shape)
        outputs.append(TensorSpec(f"present.{name}", after, dtype, "state"))
        dynamic.append(tuple(i for i, size in enumerate(shape) if isinstance(size, str)))
    inputs += recurrent
    if step.apart:
        examples = [t[:1] for t in examples[:3]] + [examples[3], *memory.row(states, 0)]
        dynamic = [(), (1,), (), (0,), *(() for _ in states)]
        inputs[:3] = [replace(spec, shape=(1, *spec.shape[1:])) for spec in inputs[:3]]
    module, names, fakes = trace(step, inputs, examples, dynamic)
    functionalize(module.graph)
    module.recompile()
    tokens = (1, 1) if size == 1 else token_range(fakes[0].shape[1])
    spec = CacheSpec(tuple(LayerState() for _ in memory.keys), tuple(recurrent))
    return Program(
        module, tuple(inputs), tuple(outputs), spec, tuple(examples), {"parameters": names}, tokens,
        context=longest_context(inputs, fakes, at_once=False),
    )  # fmt: skip


def token_range(length: torch.SymInt) -> tuple[int, int | None]:
    """The counts of tokens around QUERIES that keep what the trace assumed of them true.

    A loop over chunks is traced for one chunk, say, which leaves a guard on the chunk count.
    None: any number from the first on.
    """
    symbol = length.node.expr
    guards = {str(PythonPrinter().doprint(guard.expr)) for guard in length.node.shape_env.guards
              if guard.expr.free_symbols == {symbol}}  # fmt: skip
    check = eval(
        f"lambda {symbol}: {' and '.join(map('({})'.format, guards)) or True}", {"math": math}
    )
    first, last = QUERIES, QUERIES
    while first > 2 and check(first - 1):
        first -= 1
    while last < LONGEST and check(last + 1):
        last += 1
    return first, last if last < LONGEST else None
