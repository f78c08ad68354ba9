"""Codebooks of 2**bits levels: fixed ones, and those of least weighted error on given data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
BINS = 2048
LLOYD_MAX = {
    2: (0.1977, 0.6622),
    3: (0.1025, 0.3160, 0.5595, 0.8810),
    4: (0.0505, 0.1525, 0.2575, 0.3678, 0.4868, 0.6195, 0.7744, 0.9690),
}
"""Positive halves of the levels of least squared error for 64 normal samples scaled to [-1, 1]."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """What codes mean: ``code`` counts the midpoints below a value and reads as levels * unit.

    midpoints float32 [2**bits - 1] and levels int8 [2**bits], both ascending; unit a float that
    float32 holds.
    """

    midpoints: Tensor
    levels: Tensor
    unit: float

    @classmethod
    def of(cls, levels: Tensor) -> Codebook:
        """The nearest codebook to ascending levels [2**bits]; midpoints lie between its own."""
        unit = float(torch.tensor(max(float(levels.abs().max()), 1e-12) / 127))
        whole = torch.round(levels.double() / unit)
        midpoints = (whole[1:] + whole[:-1]) / 2 * unit
        return cls(midpoints.float(), whole.to(torch.int8), unit)

    @property
    def bits(self) -> int:
        return len(self.levels).bit_length() - 1

    @property
    def values(self) -> Tensor:
        """float32 [2**bits]."""
        return (self.levels.double() * self.unit).float()

    def encode(self, y: Tensor) -> Tensor:
        """uint8 codes of normalised values, in their shape."""
        return torch.bucketize(y.float().contiguous(), self.midpoints.to(y.device)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of codes, in their shape."""
        return self.values.to(codes.device)[codes.int()]


@cache
def fixed(name: str, bits: int) -> Codebook:
    """A data-free codebook in [-1, 1]: "lloyd_max", "normal_float" or "uniform" (the only one of
    8 bits).

    lloyd_max: see LLOYD_MAX. normal_float: the quantiles of a normal with an exact zero and both
    ends, of QLoRA (Dettmers et al., 2023, arXiv 2305.14314). uniform: equal steps, ends included.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
    if bits == 8 or name == "uniform":
        return Codebook.of(torch.linspace(-1, 1, 2**bits))
    if name == "lloyd_max":
        half = torch.tensor(LLOYD_MAX[bits])
        return Codebook.of(torch.cat((-half.flip(0), half)))
    if name != "normal_float":
        raise ValueError(f"codebook must be lloyd_max, normal_float or uniform, got {name!r}")
    wide, middle = 2 ** (bits + 1), 2 ** (bits - 1)
    top = 1 - 0.5 * (1 / wide + 1 / (wide - 2))
    positive = torch.special.ndtri(torch.linspace(0.5, top, middle + 1, dtype=torch.float64))
    negative = -torch.special.ndtri(torch.linspace(top, 0.5, middle, dtype=torch.float64))
    return Codebook.of(torch.cat((negative[:-1], positive)) / positive[-1])


def gaussian(bits: int) -> Codebook:
    """The codebook of least squared error for a standard normal (Max, 1960; Lloyd, 1982)."""
    y = torch.linspace(-6, 6, 16 * BINS + 1, dtype=torch.float64)
    return Codebook.of(kmeans(y, torch.exp(-0.5 * y.square()), 2**bits))


def fitted(y: Tensor, weight: Tensor, bits: int) -> Codebook:
    """The codebook of least sum weight * (y - level)**2 (Eq. 7 of KVQuant, arXiv 2401.18079)."""
    return Codebook.of(kmeans(y, weight, 2**bits))


def q_norm(book: Codebook, y: Tensor, weight: Tensor | None = None) -> Codebook:
    """The same codes read with levels stretched and shifted, so that decoded values have the mean
    and the standard deviation of y (Q-Norm of KVQuant)."""
    decoded = book.decode(book.encode(y)).double()
    mean, spread = _moments(y.double(), weight)
    coded_mean, coded_spread = _moments(decoded, weight)
    ratio = spread / coded_spread if coded_spread > 0 else 1.0
    stretched = Codebook.of((book.values.double() - coded_mean) * ratio + mean)
    return Codebook(book.midpoints, stretched.levels, stretched.unit)


def kmeans(y: Tensor, weight: Tensor, k: int, bins: int = BINS) -> Tensor:
    """Ascending centres float64 [k] of the exact weighted 1-D k-means of y with weights >= 0.

    By dynamic programming over sorted values: in every optimum clusters are intervals, and the
    best start of the last one never moves left as the end moves right, so each row is found by
    divide and conquer in O(n log n). More than ``bins`` distinct values are merged to bins of
    equal width first; the centres stay means of the values themselves. Fewer than k distinct
    values repeat the last. ValueError where there is nothing of positive weight.
    """
    moments = _binned(y.double().flatten().numpy(), weight.double().flatten().numpy(), bins)
    count = moments.shape[1]
    sums = np.concatenate((np.zeros((3, 1)), moments.cumsum(1)), 1)
    starts = np.zeros((k, count + 1), dtype=np.int64)
    best = _spread(sums, np.zeros(count + 1, dtype=np.int64), np.arange(count + 1))
    for row in range(1, min(k, count)):
        best, starts[row] = _extend(sums, best)
    edges, end = [], count
    for row in reversed(range(min(k, count))):
        edges.append((int(starts[row][end]), end))
        end = edges[-1][0]
    centres = [_mean(sums, start, stop) for start, stop in reversed(edges) if start < stop]
    return torch.tensor(centres + centres[-1:] * (k - len(centres)), dtype=torch.float64)


def _binned(y: np.ndarray, weight: np.ndarray, bins: int) -> np.ndarray:
    """Weight, first and second moment [3, n] of the distinct values, or of bins, that weigh."""
    keep = weight > 0
    y, weight = y[keep], weight[keep]
    if not len(y):
        raise ValueError("k-means needs values of positive weight")
    low, high = y.min(), y.max()
    slots = np.minimum(((y - low) * (bins / max(high - low, 1e-300))).astype(np.int64), bins - 1)
    if len(y) <= bins:
        slots = np.unique(y, return_inverse=True)[1]
    moments = np.stack([np.bincount(slots, weight * power) for power in (1.0, y, y * y)])
    moments = moments[:, moments[0] > 0]
    return moments / moments[0].sum()


def _extend(sums: np.ndarray, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least cost [n + 1] of one more interval, and where its last one starts."""
    size = len(best)
    cost, start = best.copy(), np.zeros(size, dtype=np.int64)
    cost[0] = 0.0
    known = np.array([0, size])
    bound = np.array([0, size - 1])
    step = 1 << (size - 1).bit_length()
    while step > 1:
        step //= 2
        ends = np.arange(step, size, 2 * step)
        low = bound[np.searchsorted(known, ends) - 1]
        high = np.minimum(bound[np.searchsorted(known, ends)], ends - 1)
        lengths = high - low + 1
        first = np.concatenate(([0], lengths.cumsum()[:-1]))
        which = np.repeat(np.arange(len(ends)), lengths)
        candidates = np.arange(lengths.sum()) - first[which] + low[which]
        costs = best[candidates] + _spread(sums, candidates, ends[which])
        least = np.minimum.reduceat(costs, first)
        hits = np.flatnonzero(costs == least[which])
        chosen = candidates[hits[np.unique(which[hits], return_index=True)[1]]]
        cost[ends], start[ends] = least, chosen
        order = np.argsort(np.concatenate((known, ends)), kind="stable")
        known = np.concatenate((known, ends))[order]
        bound = np.concatenate((bound, chosen))[order]
    return cost, start


def _spread(sums: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Weighted squared distance to their mean of the values start..stop-1."""
    weight, first, second = sums[:, stop] - sums[:, start]
    return np.maximum(second - first * first / np.where(weight > 0, weight, 1.0), 0.0)


def _mean(sums: np.ndarray, start: int, stop: int) -> float:
    weight, first, _ = sums[:, stop] - sums[:, start]
    return float(first / weight)


def _moments(y: Tensor, weight: Tensor | None) -> tuple[float, float]:
    w = torch.ones_like(y) if weight is None else weight.double()
    mean = (w * y).sum() / w.sum()
    spread = ((w * (y - mean).square()).sum() / w.sum()).sqrt()
    return float(mean), float(spread)
