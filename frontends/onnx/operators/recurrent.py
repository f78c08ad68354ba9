"""RNN, GRU and LSTM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.frontends.onnx.registry import operator

_ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "affine": lambda x, a, b: a * x + b,
    "elu": lambda x, a, b: F.elu(x, a),
    "hardsigmoid": lambda x, a, b: (a * x + b).clamp(0, 1),
    "leakyrelu": lambda x, a, b: F.leaky_relu(x, a),
    "relu": lambda x, a, b: torch.relu(x),
    "scaledtanh": lambda x, a, b: a * torch.tanh(b * x),
    "sigmoid": lambda x, a, b: torch.sigmoid(x),
    "softplus": lambda x, a, b: F.softplus(x),
    "softsign": lambda x, a, b: F.softsign(x),
    "tanh": lambda x, a, b: torch.tanh(x),
    "thresholdedrelu": lambda x, a, b: torch.where(x > a, x, 0),
}
_DEFAULTS = {
    "affine": (1.0, 0.0), "elu": (1.0, 0.0), "hardsigmoid": (0.2, 0.5),
    "leakyrelu": (0.01, 0.0), "scaledtanh": (1.0, 1.0), "thresholdedrelu": (1.0, 0.0),
}  # fmt: skip


class _Layer:
    """One recurrent operator: its directions run one after the other."""

    def __init__(
        self, x: Tensor, weight: Tensor, inner: Tensor, bias: Any, lengths: Any, activations: Any,
        alphas: Any, betas: Any, clip: Any, direction: str, layout: int, names: tuple[str, ...],
    ) -> None:  # fmt: skip
        self.x = x.transpose(0, 1) if layout else x
        self.weight, self.inner, self.lengths = weight, inner, lengths
        self.count, self.size = inner.shape[0], inner.shape[2]
        self.gates = weight.shape[1] // self.size
        self.bias = (
            weight.new_zeros(self.count, 2 * self.gates * self.size) if bias is None else bias
        )
        self.layout, self.clip = layout, clip
        self.backwards = [direction == "reverse", True][: self.count]
        self.standard = (
            activations is None or [a.lower() for a in activations] == [*names] * self.count
        )
        given = [name.lower() for name in activations or names * self.count]
        self.functions = self._functions(given, list(alphas or []), list(betas or []), len(names))

    def _functions(self, names: list[str], alphas: list, betas: list, count: int) -> list[list]:
        made = []
        for name in names:
            low, high = _DEFAULTS.get(name, (0.0, 0.0))
            takes = name in _DEFAULTS
            a = alphas.pop(0) if takes and alphas else low
            b = betas.pop(0) if takes and betas else high
            made.append(lambda v, f=_ACTIVATIONS[name], a=a, b=b: f(v, a, b))
        return [made[i : i + count] for i in range(0, len(made), count)]

    def limit(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def start(self, state: Tensor | None) -> Tensor:
        if state is None:
            return self.x.new_zeros(self.count, self.x.shape[1], self.size)
        return state.transpose(0, 1) if self.layout else state

    def fused(self, states: list[Tensor], order: list[int], run: Callable) -> list[Tensor] | None:
        """By torch's own kernel, its gates in this order; None where the layer is special."""
        if not self.standard or self.clip is not None or self.lengths is not None:
            return None
        if self.backwards == [True]:
            return None
        self._check(states, len(order))
        parts = []
        for d in range(self.count):
            first, second = self.bias[d].chunk(2)
            parts += [_reordered(t, order) for t in (self.weight[d], self.inner[d], first, second)]
        out, *last = run(self.x, states, parts, self.count == 2)
        out = out.unflatten(-1, (self.count, self.size)).transpose(1, 2)
        return [out, *last]

    def _check(self, states: list[Tensor], gates: int) -> None:
        """torch's kernels trust that sizes and types fit."""
        rows, dtype = gates * self.size, self.weight.dtype
        wanted = [
            (self.x, (*self.x.shape[:2], self.weight.shape[-1])),
            (self.weight, (self.count, rows, self.weight.shape[-1])),
            (self.inner, (self.count, rows, self.size)),
            (self.bias, (self.count, 2 * rows)),
            *((state, (self.count, self.x.shape[1], self.size)) for state in states),
        ]
        if self.count != len(self.backwards) or not dtype.is_floating_point:
            raise ValueError(f"{self.count} directions of {dtype} do not fit the operator")
        for tensor, shape in wanted:
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"an input is {tensor.dtype} {list(tensor.shape)}, wanted {dtype} {list(shape)}"
                )

    def run(self, states: list[Tensor], step: Callable) -> list[Tensor]:
        outs, lasts = [], []
        for d in range(self.count):
            x = self._turned(self.x, d)
            first, second = self.bias[d].chunk(2)
            projected = F.linear(x, self.weight[d])
            current = [state[d] for state in states]
            rows = []
            for t in range(x.shape[0]):
                new = step(
                    projected[t], current, self.inner[d], first, second, self.functions[d], d
                )
                if self.lengths is not None:
                    alive = (self.lengths > t)[:, None]
                    new = [torch.where(alive, n, old) for n, old in zip(new, current, strict=True)]
                    rows.append(torch.where(alive, new[0], 0))
                else:
                    rows.append(new[0])
                current = new
            out = torch.stack(rows)
            outs.append(self._turned(out, d))
            lasts.append(current)
        return [torch.stack(outs, 1), *(torch.stack(parts) for parts in zip(*lasts, strict=True))]

    def _turned(self, x: Tensor, direction: int) -> Tensor:
        if not self.backwards[direction]:
            return x
        if self.lengths is None:
            return x.flip(0)
        steps = torch.arange(x.shape[0], device=x.device)[:, None]
        ends = self.lengths.to(torch.int64)[None]
        index = torch.where(steps < ends, ends - 1 - steps, steps)
        return x.gather(0, index[..., None].expand(x.shape))

    def results(self, out: Tensor, *last: Tensor) -> tuple[Tensor, ...]:
        if not self.layout:
            return (out, *last)
        return (out.permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in last))


def _reordered(weight: Tensor, order: list[int]) -> Tensor:
    parts = weight.chunk(len(order))
    return torch.cat([parts[i] for i in order])


@operator("RNN")
def rnn(
    x, w, r, bias=None, lengths=None, h=None, *, activation_alpha=None, activation_beta=None,
    activations=None, clip=None, direction="forward", hidden_size=None, layout=0,
    output_sequence=0,
):  # fmt: skip
    layer = _Layer(
        x, w, r, bias, lengths, activations, activation_alpha, activation_beta, clip, direction,
        layout, ("tanh",),
    )  # fmt: skip

    def step(px, states, inner, first, second, functions, d):
        return [functions[0](layer.limit(px + F.linear(states[0], inner, first + second)))]

    def run(x, states, parts, both):
        return torch.rnn_tanh(x, states[0], parts, True, 1, 0.0, False, both, False)

    states = [layer.start(h)]
    return layer.results(*(layer.fused(states, [0], run) or layer.run(states, step)))


@operator("GRU")
def gru(
    x, w, r, bias=None, lengths=None, h=None, *, activation_alpha=None, activation_beta=None,
    activations=None, clip=None, direction="forward", hidden_size=None, layout=0,
    linear_before_reset=0, output_sequence=0,
):  # fmt: skip
    layer = _Layer(
        x, w, r, bias, lengths, activations, activation_alpha, activation_beta, clip, direction,
        layout, ("sigmoid", "tanh"),
    )  # fmt: skip

    def step(px, states, inner, first, second, functions, d):
        f, g = functions
        (h,) = states
        size = layer.size
        px = px + first
        gates = px[:, : 2 * size] + F.linear(h, inner[: 2 * size], second[: 2 * size])
        z, reset = f(layer.limit(gates)).chunk(2, -1)
        if linear_before_reset:
            new = px[:, 2 * size :] + reset * F.linear(h, inner[2 * size :], second[2 * size :])
        else:
            new = px[:, 2 * size :] + F.linear(reset * h, inner[2 * size :], second[2 * size :])
        return [(1 - z) * g(layer.limit(new)) + z * h]

    def run(x, states, parts, both):
        return torch.gru(x, states[0], parts, True, 1, 0.0, False, both, False)

    states = [layer.start(h)]
    made = layer.fused(states, [1, 0, 2], run) if linear_before_reset else None
    return layer.results(*(made or layer.run(states, step)))


@operator("LSTM")
def lstm(
    x, w, r, bias=None, lengths=None, h=None, c=None, peepholes=None, *, activation_alpha=None,
    activation_beta=None, activations=None, clip=None, direction="forward", hidden_size=None,
    input_forget=0, layout=0, output_sequence=0,
):  # fmt: skip
    layer = _Layer(
        x, w, r, bias, lengths, activations, activation_alpha, activation_beta, clip, direction,
        layout, ("sigmoid", "tanh", "tanh"),
    )  # fmt: skip

    def step(px, states, inner, first, second, functions, d):
        sigma, tanh, out = functions
        h, c = states
        i, o, f, g = (px + F.linear(h, inner, first + second)).chunk(4, -1)
        pi, po, pf = (0, 0, 0) if peepholes is None else peepholes[d].chunk(3)
        i = sigma(layer.limit(i + pi * c))
        f = 1 - i if input_forget else sigma(layer.limit(f + pf * c))
        c = f * c + i * tanh(layer.limit(g))
        return [sigma(layer.limit(o + po * c)) * out(c), c]

    def run(x, states, parts, both):
        return torch.lstm(x, states, parts, True, 1, 0.0, False, both, False)

    states = [layer.start(h), layer.start(c)]
    plain = peepholes is None and not input_forget
    made = layer.fused(states, [0, 2, 3, 1], run) if plain else None
    return layer.results(*(made or layer.run(states, step)))
