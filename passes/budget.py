"""What codes cost, and how to spend a number of bits on the layers that need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd
from typing import Any

import numpy as np

from regraft.kernels.kvquant.layout import BLOCK
from regraft.kernels.kvquant.reference import cap


@dataclass(frozen=True)
class Option:
    """A way to code one tensor: what it costs, in bits a token, and its error."""

    bits: int
    error: float
    choice: Any


def shares(outliers: float) -> tuple[float, ...]:
    """The shares of outliers among which a budget chooses: none, half and all of them."""
    return tuple(sorted({0.0, outliers / 2, outliers}))


def token_bits(kind: str, bits: int, outliers: float, heads: int, size: int, group: int = 0) -> int:
    """Bits that a token of keys or values takes in the body, rounded up.

    A code an element; 32 bits an outlier, and where those of each head begin in a block; float16
    scale and zero a token of values, or a channel of keys and ``group`` tokens (0: none).
    """
    channels = heads * size
    count = cap(outliers, channels)
    total = bits * channels + 32 * count + (32 * (heads + 1) / BLOCK if count else 0)
    if kind == "value":
        total += 32
    elif group:
        total += 32 * channels / group
    return -int(-total // 1)


def effective_bits(
    key_bits: int,
    value_bits: int,
    outliers: float,
    heads: int,
    size: int,
    group: int = 0,
) -> float:
    """Bits an element of the body, of keys and values together, everything counted.

    The paper's own count (1 % outliers of 32 bits, 32 bits a token of scale and zero) is 3.33 to
    3.35 for 3 bits. Tables of rotations, sinks and tails are not of this.
    """
    key = token_bits("key", key_bits, outliers, heads, size, group)
    return (key + token_bits("value", value_bits, outliers, heads, size)) / (2 * heads * size)


def cheapest(options: Sequence[Sequence[Option]], limit: float) -> list[Option]:
    """One option of each tensor, of least total error within ``limit`` bits a token.

    Exact: a knapsack by dynamic programming over the bits spent. ValueError where even the
    smallest options exceed the limit.
    """
    least = [min(option.bits for option in each) for each in options]
    room = int(limit) - sum(least)
    if room < 0:
        raise ValueError(f"the least is {sum(least) / limit:.2f} times that")
    extra = [
        [option.bits - low for option in each] for each, low in zip(options, least, strict=True)
    ]
    unit = reduce(gcd, (cost for each in extra for cost in each), 0) or 1
    slots = min(room, sum(max(each) for each in extra)) // unit + 1
    errors, taken = np.zeros(slots), []
    for each, costs in zip(options, extra, strict=True):
        made, best = np.full(slots, np.inf), np.zeros(slots, np.int64)
        for index, (option, cost) in enumerate(zip(each, costs, strict=True)):
            if (first := cost // unit) < slots:
                error = errors[: slots - first] + option.error
                better = error < made[first:]
                made[first:][better], best[first:][better] = error[better], index
        errors = made
        taken.append(best)
    chosen, slot = [], slots - 1
    for each, costs, best in reversed(list(zip(options, extra, taken, strict=True))):
        chosen.append(each[best[slot]])
        slot -= costs[best[slot]] // unit
    return chosen[::-1]
