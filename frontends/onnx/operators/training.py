"""Optimiser steps."""

from __future__ import annotations

import torch

from regraft.frontends.onnx.registry import operator

_DOMAIN = "ai.onnx.preview.training"


def _by_tensor(step, rate, turn, values, count, **attributes):
    groups = [values[i :: len(values) // count] for i in range(len(values) // count)]
    made = [step(rate, turn, *group, **attributes) for group in groups]
    return tuple(result for parts in zip(*made, strict=True) for result in parts)


@operator("Adagrad", domain=_DOMAIN)
def adagrad(rate, turn, *values, decay_factor=0.0, epsilon=1e-6, norm_coefficient=0.0):
    def step(rate, turn, x, gradient, squares):
        rate = rate / (1 + turn * decay_factor)
        gradient = norm_coefficient * x + gradient
        squares = squares + gradient * gradient
        return x - rate * gradient / (squares.sqrt() + epsilon), squares

    return _by_tensor(step, rate, turn, values, 3)


@operator("Adam", domain=_DOMAIN)
def adam(
    rate, turn, *values, alpha=0.9, beta=0.999, epsilon=1e-6, norm_coefficient=0.0,
    norm_coefficient_post=0.0,
):  # fmt: skip
    def step(rate, turn, x, gradient, mean, squares):
        gradient = norm_coefficient * x + gradient
        mean = alpha * mean + (1 - alpha) * gradient
        squares = beta * squares + (1 - beta) * gradient * gradient
        first = rate * torch.sqrt(1 - beta**turn) / (1 - alpha**turn)
        rate = torch.where(turn > 0, first, rate)
        new = x - rate * mean / (squares.sqrt() + epsilon)
        return (1 - norm_coefficient_post) * new, mean, squares

    return _by_tensor(step, rate, turn, values, 4)


@operator("Momentum", domain=_DOMAIN)
def momentum(rate, turn, *values, alpha, beta, mode, norm_coefficient):
    def step(rate, turn, x, gradient, speed):
        gradient = norm_coefficient * x + gradient
        share = torch.where(turn > 0, beta, 1.0)
        speed = alpha * speed + share * gradient
        return x - rate * (gradient + alpha * speed if mode == "nesterov" else speed), speed

    return _by_tensor(step, rate, turn, values, 3)
