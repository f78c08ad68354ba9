"""How much the loss depends on each head and filter: gradients to masks of ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from regraft.passes.pruning.blocks import Block
from regraft.passes.pruning.samples import Sample
from regraft.passes.recorder import Runner
from regraft.program import Program, RegraftError


@dataclass(frozen=True, eq=False)
class Gradients:
    """For each block the gradients of each row's loss to the masks, float32 [rows, units], and for
    each sample and block how much the loss depends on each token: the squared norm of its gradient,
    [rows, length]."""

    units: list[Tensor]
    tokens: list[list[Tensor]]


def gradients(
    program: Program,
    blocks: Sequence[Block],
    found: Sequence[Sample],
    labelled: bool,
    tell: Callable[[str], None],
) -> Gradients:
    """One run forward and back a sample; masks are applied to what each output layer reads.

    labelled: the loss is that of the labels. Else what a row adds has the covariance of the
    gradients of labels drawn from the model's own output, so that squares of gradients are the
    second derivatives of the KL divergence from the model as it is (for outputs that are no
    logits, of the squared error).
    """
    units: list[list[Tensor]] = [[] for _ in blocks]
    tokens: list[list[Tensor]] = []
    generator = torch.Generator().manual_seed(0)
    for index, sample in enumerate(found):
        tell(f"gradients {index + 1} of {len(found)}")
        seen: dict[Block, tuple[Tensor, Tensor]] = {}

        def watch(block: Block, *args: Any, seen: Any = seen) -> tuple[Any, ...]:
            x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            read = x.detach()  # a hook that held x would keep the sample's whole graph alive
            x.register_hook(lambda gradient: seen.update({block: _summed(block, read, gradient)}))
            return (x, *args[1:])

        edits: dict[fx.Node, Any] = {
            block.output: (lambda *args, block=block: watch(block, *args)) for block in blocks
        }
        with torch.enable_grad():
            outputs = Runner(program, edits).run(*sample.inputs)
            _loss(program, outputs, sample, labelled, generator).backward()
        nothing = [block.name for block in blocks if block not in seen]
        if nothing:
            raise RegraftError(f"the loss does not depend on {nothing[0]}: calibrate with labels")
        for block, store in zip(blocks, units, strict=True):
            store.append(seen[block][0].cpu())
        tokens.append([seen[block][1] for block in blocks])
    return Gradients([torch.cat(store) for store in units], tokens)


def _summed(block: Block, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to masks of units [rows, units], and squared norms of tokens' [rows, length]."""
    product = x * gradient
    norms = gradient.float().square().sum(-1)
    if product.dim() > 2:
        product, norms = product.flatten(1, -2).sum(1), norms.flatten(1)
    else:
        norms = norms[:, None]
    product = product.float()
    return product.unflatten(-1, (block.units, block.width)).sum(-1), norms


def _loss(
    program: Program, outputs: Any, sample: Sample, labelled: bool, generator: torch.Generator
) -> Tensor:
    named = {spec.name.split(".")[-1]: x for spec, x in zip(program.outputs, outputs, strict=True)}
    logits = named.get("logits")
    if labelled:
        if sample.labels is None:
            raise RegraftError("Prune(labels=True) needs a batch's 'labels' in calibration")
        if logits is None:
            raise RegraftError("Prune(labels=True) needs a model that gives logits")
        return _labelled(logits, sample.labels)
    if logits is not None and logits.shape[-1] > 1:
        root = logits.detach().float().log_softmax(-1)
        noise = torch.randn(logits.shape, generator=generator).to(logits)
        direction = (root / 2).exp() * noise
        direction = direction - root.exp() * ((root / 2).exp() * noise).sum(-1, keepdim=True)
        return (logits * direction).sum()
    kept = [logits] if logits is not None else [
        x
        for spec, x in zip(program.outputs, outputs, strict=True)
        if spec.role != "cache" and x.is_floating_point() and x.requires_grad
    ]  # fmt: skip
    total = torch.zeros(())
    for x in kept:
        noise = torch.randn(x.shape, generator=generator).to(x)
        scale = x.detach().float().square().mean().sqrt().clamp(min=1e-6)
        total = total + (x * noise / scale).sum() / math.sqrt(max(x[0].numel(), 1))
    return total


def _labelled(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over rows and tokens; -100 is ignored."""
    if labels.is_floating_point():
        return F.mse_loss(logits.reshape(labels.shape).float(), labels.float(), reduction="sum")
    if logits.shape[:-1] != labels.shape:
        raise RegraftError(
            f"labels are {list(labels.shape)}, the model's logits {list(logits.shape)}"
        )
    return F.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=-100
    )
