"""What every program shares, and the blocks of the transformers among them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Program:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    forward: Callable[..., Any]

    def __init__(self, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.turn, self.device = 0, device
        self.log: list[Any] = []
        self.kept: list[Any] = []
        self.build()
        self.kept.append(self.model)
        for name, value in vars(self).items():
            setattr(self, name, _moved(value, device))

    def build(self) -> None:
        raise NotImplementedError

    def step(self) -> Any:
        raise NotImplementedError

    def sgd(self, model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        self.kept.append(optimizer)
        return optimizer

    def learn(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, Tensor | nn.Module):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool = False, relative: int = 0) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.bias = nn.Parameter(torch.zeros(heads, 2 * relative - 1)) if relative else None
        self.attention: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
        if self.bias is not None:
            place = torch.arange(length, device=x.device)
            scores = scores + self.bias[:, place[:, None] - place + length - 1]
        if self.causal:
            scores = scores.masked_fill(
                torch.ones(length, length, device=x.device).triu(1).bool(), -torch.inf
            )
        weights = scores.softmax(-1)
        self.attention = weights.detach()  # kept on the module, as the originals do
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Token ids (batch, length) to ``outputs`` values a token."""

    def __init__(
        self, words: int, outputs: int, length: int, causal: bool = False, relative: bool = False
    ) -> None:
        super().__init__()
        width, heads = 64, 4
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(width, heads, causal, length if relative else 0) for _ in range(2)
        )
        self.head = nn.Linear(width, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x)
