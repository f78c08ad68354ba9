"""Losses over classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from regraft.frontends.onnx.registry import operator


@operator("NegativeLogLikelihoodLoss")
def negative_log_likelihood(x, target, weight=None, *, ignore_index=None, reduction="mean"):
    ignored = -100 if ignore_index is None else ignore_index
    return F.nll_loss(x, target.to(torch.int64), weight, ignore_index=ignored, reduction=reduction)


@operator("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy(
    x, target, weight=None, *, ignore_index=None, reduction="mean", outputs=1
):
    logs = torch.log_softmax(x, 1)
    return (
        negative_log_likelihood(
            logs, target, weight, ignore_index=ignore_index, reduction=reduction
        ),
        logs,
    )
