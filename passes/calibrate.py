"""Codebooks and key ranges that cost a model least, from what it does on sample text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from regraft.kernels.kvquant.codebook import Codebook, fitted, fixed, q_norm
from regraft.kernels.kvquant.feedback import Feedback, feedback
from regraft.kernels.kvquant.reference import cap, key_outliers, quantize_values
from regraft.kernels.kvquant.simulate import read_keys, read_values
from regraft.passes.recorder import record
from regraft.program import Program, RegraftError
from regraft.program.program import source_of

LENGTH, PIECES, ROUNDS = 512, 16, 2
"""Tokens of a piece of text, the most pieces that are used, how often ranges are fitted anew."""
KINDS = ("key", "value")
"""Where cached_attention has them: arguments 1 and 2."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Keys or values float16 [1, H, n, D] of a layer, and the gradients float32 of the loss to
    them."""

    x: Tensor
    gradient: Tensor

    @property
    def fisher(self) -> Tensor:
        """What errors of a head's channels cost together, float32 [H, D, D]."""
        g = self.gradient[0].float()
        return g.mT @ g / g.shape[1]


@dataclass(frozen=True, eq=False)
class Fit:
    """A codebook, its share of outliers, the error expected of them (what they add to the loss of
    a token), ``Samples.fisher``, and for keys float16 scale and zero of each channel
    [1, H, 1, D]."""

    book: Codebook
    outliers: float
    error: float
    fisher: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None

    @property
    def feedback(self) -> Feedback | None:
        return None if self.fisher is None else feedback(self.fisher, self.scale)

    def tensors(self) -> dict[str, Tensor]:
        """All but the share and the error, by name; the codebook's unit as float32 []."""
        unit = torch.tensor(self.book.unit)
        found = {"levels": self.book.levels, "midpoints": self.book.midpoints, "unit": unit}
        rest = {"fisher": self.fisher, "scale": self.scale, "zero": self.zero}
        return found | {name: x for name, x in rest.items() if x is not None}


def pieces(calibration: Sequence[Any], vocabulary: int | None) -> list[Tensor]:
    """Token ids [1, n <= LENGTH] of every row of the batches, padding left out.

    A batch is a tensor of ids [rows, length] or [length], or a dict with input_ids and
    perhaps an attention_mask.
    """
    found = []
    for batch in calibration:
        named = batch if hasattr(batch, "keys") else {"input_ids": batch}
        ids = torch.as_tensor(named["input_ids"])
        if ids.dtype not in (torch.int64, torch.int32) or ids.dim() not in (1, 2):
            raise RegraftError("calibration takes batches of token ids [rows, length]")
        ids = torch.atleast_2d(ids).long()
        mask = named.get("attention_mask") if hasattr(batch, "keys") else None
        real = torch.ones_like(ids) if mask is None else torch.atleast_2d(torch.as_tensor(mask))
        for row, kept in zip(ids, real, strict=True):
            found += [p[None] for p in row[kept.bool()].split(LENGTH) if len(p) > 1]
    if not found:
        raise RegraftError("calibration is empty: give batches of token ids, 16 of 512 are enough")
    for ids in found:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            wrong = low if low < 0 else high
            raise RegraftError(
                f"calibration holds token {wrong}, the model knows {vocabulary}: use its tokenizer"
            )
    return found


def vocabulary(program: Program) -> int | None:
    """How many tokens the model knows, where it looks its ids up in one table."""
    ids = program.graph.find_nodes(op="placeholder")[0]
    tables = [user.args[0] for user in ids.users if user.target is torch.ops.aten.embedding.default]
    return int(getattr(program.graph_module, tables[0].target).shape[0]) if tables else None


def collect(
    program: Program,
    nodes: Sequence[fx.Node],
    batches: Sequence[Tensor],
    sink: int,
    tell: Callable[[str], None],
) -> list[dict[str, Samples]]:
    """A layer's keys and values over batches [1, n] and the loss's gradients to them, the first
    ``sink`` tokens left out. Of many batches PIECES are used, evenly spread."""
    used = sorted({i * len(batches) // PIECES for i in range(PIECES)})
    kept: list[dict[str, list[Tensor]]] = [{} for _ in nodes]
    for turn, index in enumerate(used):
        tell(f"calibration {turn + 1} of {len(used)}")
        found = record(program, dict.fromkeys(nodes, (1, 2)), batches[index], True)
        _check_finite(found)
        for node, store in zip(nodes, kept, strict=True):
            for kind, (x, gradient) in zip(KINDS, found.pop(node), strict=True):
                assert gradient is not None
                store.setdefault(kind, []).append(_half(x[:, :, sink:]))
                store.setdefault(f"{kind} gradient", []).append(gradient[:, :, sink:].float())
    return [
        {
            kind: Samples(torch.cat(store[kind], 2), torch.cat(store[f"{kind} gradient"], 2))
            for kind in KINDS
        }
        for store in kept
    ]


def spread(bits: int, weighed: bool) -> bool:
    """Whether codes of so many bits are best read with the spread of the data (Q-Norm).

    That raises the expected loss which a budget weighs choices by, so that those of 4 bits, which
    it helps less, go without.
    """
    return bits == 2 or (bits == 4 and not weighed)


def fit(kind: str, samples: Samples, bits: int, outliers: float, qnorm: bool) -> Fit:
    """The codes of ``bits`` bits with this share of outliers that cost least; RegraftError where
    there are too few samples to tell.

    Source: KVQuant (arXiv 2401.18079), whose keys are ranged by quantiles and whose codebook
    minimises the error weighted by squared gradients and ranges (Eq. 7). Here it is fitted to
    what outliers leave to codes, and the ranges of keys are then fitted to it, in turn; codes are
    chosen with error feedback (see ``kernels/kvquant/feedback.py``).
    """
    tokens = samples.gradient.shape[2]
    if tokens < (needed := 16 * min(2**bits, 16)):
        raise RegraftError(
            f"calibration has {tokens} tokens after the sink, {bits}-bit codes need {needed}: "
            "give more text"
        )
    channels = samples.x.shape[1] * samples.x.shape[3]
    count, fisher = cap(outliers, channels), samples.fisher
    x, weight = samples.x.float(), samples.gradient.square()
    if kind == "key":
        book, y, weight, *ranges = _fit_keys(samples, x, weight, bits, outliers, count)
    else:
        book, y, weight = _fit_values(x, weight, bits, count)
        ranges = []
    if qnorm:
        book = q_norm(book, y, (weight > 0).float())
    if kind == "key":
        read = read_keys(x, *ranges, book, count, feedback(fisher, ranges[0]))
    else:
        read = read_values(x, book, count, feedback(fisher))
    error = float((samples.gradient * (x - read)).sum((1, 3)).square().mean()) / 2
    return Fit(book, outliers, error, fisher, *ranges)


def _fit_keys(
    samples: Samples, x: Tensor, costs: Tensor, bits: int, outliers: float, count: int
) -> tuple[Codebook, Tensor, Tensor, Tensor, Tensor]:
    """Codebook, normalised keys and their weights (0 for outliers), scale, zero."""
    scale, zero = quantiles(samples.x, outliers)
    channels = feedback(samples.fisher, scale).weight
    inside = (x - zero.float()).abs() <= scale
    coded = inside if count else torch.ones_like(inside)
    for turn in range(ROUNDS + 1):
        divisor = torch.where(scale == 0, 1.0, scale.float())
        y, weight = (x - zero.float()) / divisor, costs * coded
        book = fixed("uniform", 8) if bits == 8 else fitted(y, weight * divisor.square(), bits)
        if bits == 8 or turn == ROUNDS:
            break
        level = book.decode(book.encode(y))
        scale, zero = _regress(x, level, weight, scale, zero)
        coded = ~key_outliers(x, level * scale.float() + zero.float(), count, channels)
    return book, y, weight, scale, zero


def _fit_values(x: Tensor, costs: Tensor, bits: int, count: int) -> tuple[Codebook, Tensor, Tensor]:
    """Codebook, normalised values and their weights (0 for outliers)."""
    book = fixed("uniform", bits)
    _, scale, zero, residual = quantize_values(x, book, count)
    scale, zero = (part[:, None, :, None].float() for part in (scale, zero))
    scale = torch.where(scale == 0, 1.0, scale)
    weight = costs if residual is None else costs * (residual == 0)
    y = (x - zero) / scale
    return (book if bits == 8 else fitted(y, weight * scale.square(), bits)), y, weight


def quantiles(x: Tensor, outliers: float) -> tuple[Tensor, Tensor]:
    """float16 scale and zero [1, H, 1, D] of the range without the share of each channel."""
    flat = x.float().transpose(2, 3).contiguous().numpy()
    out = int(outliers / 2 * flat.shape[-1])
    found = np.partition(flat, (out, flat.shape[-1] - 1 - out), axis=-1)
    low, high = (torch.from_numpy(found[..., i]).unsqueeze(2) for i in (out, -1 - out))
    return ((high - low) / 2).half(), ((high + low) / 2).half()


def _regress(
    x: Tensor, level: Tensor, weight: Tensor, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """The scale and zero of least weighted error of each channel for the levels chosen."""
    total = weight.sum(2, keepdim=True)
    mean, middle = ((weight * part).sum(2, keepdim=True) / total for part in (x, level))
    spread = (weight * (level - middle).square()).sum(2, keepdim=True)
    slope = (weight * (level - middle) * (x - mean)).sum(2, keepdim=True) / spread
    sound = (slope > 0) & slope.isfinite()
    slope = torch.where(sound, slope, scale.float())
    return slope.half(), torch.where(sound, mean - slope * middle, zero.float()).half()


def _half(x: Tensor) -> Tensor:
    limit = torch.finfo(torch.float16).max
    return x.float().clamp(-limit, limit).half()


def _check_finite(found: dict[fx.Node, list[tuple[Tensor, Tensor | None]]]) -> None:
    """RegraftError naming the first layer that is not finite; its values before gradients."""
    for part, what in enumerate(("", "gradients of ")):
        for node, pairs in found.items():
            for kind, pair in zip(KINDS, pairs, strict=True):
                x = pair[part]
                if x is not None and not bool(x.isfinite().all()):
                    raise RegraftError(
                        f"calibration: the {what}{kind}s of {source_of(node)} are not finite; run "
                        "the model in float32 or bfloat16, or leave out the batch that does this"
                    )
