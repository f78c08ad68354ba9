"""torch-pruning (DepGraph, arXiv 2301.12900) as a peer: heads and filters by a Taylor criterion."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "torch-pruning, Taylor"
STEPS = 8
"""Of the bisection that finds the ratio for a budget."""


def installed() -> bool:
    return importlib.util.find_spec("torch_pruning") is not None


def pruned(model: Any, calibration: list[dict[str, Tensor]], budget: float) -> tuple[Any, float]:
    """A copy of a BERT classifier with at most this share of the multiplications of its linear
    layers, and the share; gradients are those of the labels' loss on the calibration batches."""
    scored = copy.deepcopy(model)
    scored.requires_grad_(True)
    for batch in calibration:
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        F.cross_entropy(scored(**inputs).logits, batch["labels"], reduction="sum").backward()
    whole = _size(model)
    low, high, best = 0.0, 1.0, scored
    for _ in range(STEPS):
        ratio = (low + high) / 2
        made = _cut(scored, ratio, calibration[0])
        if _size(made) > budget * whole:
            low = ratio
        else:
            high, best = ratio, made
    best.requires_grad_(False)
    return best.eval(), _size(best) / whole


def _size(model: Any) -> int:
    layers = model.bert.encoder.modules()
    return sum(m.weight.numel() for m in layers if isinstance(m, torch.nn.Linear))


def _cut(scored: Any, ratio: float, example: dict[str, Tensor]) -> Any:
    import torch_pruning as tp

    made = copy.deepcopy(scored)
    for mine, theirs in zip(made.parameters(), scored.parameters(), strict=True):
        mine.grad = None if theirs.grad is None else theirs.grad.clone()
    layers = made.bert.encoder.layer
    heads = {
        projection: made.config.num_attention_heads
        for layer in layers
        for self in (layer.attention.self,)
        for projection in (self.query, self.key, self.value)
    }
    residual = [m for layer in layers for m in (layer.attention.output.dense, layer.output.dense)]
    inputs = {name: x[:2] for name, x in example.items() if name != "labels"}
    pruner = tp.pruner.BasePruner(
        made,
        inputs,
        tp.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=ratio,
        head_pruning_ratio=ratio,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[made.bert.embeddings, made.bert.pooler, made.classifier, *residual],
        output_transform=lambda out: out.logits.sum(),
    )
    pruner.step()
    return made
