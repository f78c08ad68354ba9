from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.kernels.kvquant.codebook import Codebook, fitted, fixed, gaussian, kmeans, q_norm


def cost(y, weight, centres):
    return (weight * (y[:, None] - centres).square().amin(1)).sum().item()


def least(y, weight, k):
    """Of every way to cut the sorted values into k intervals."""
    order = y.argsort()
    y, weight = y[order].numpy(), weight[order].numpy()
    best = float("inf")
    for cuts in combinations(range(1, len(y)), k - 1):
        parts = zip(np.split(y, cuts), np.split(weight, cuts), strict=True)
        best = min(best, sum(np.sum(w * (v - np.average(v, weights=w)) ** 2) for v, w in parts))
    return best


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 11), st.integers(1, 4), st.integers(0, 2**31))
def test_kmeans_is_the_optimum(count, k, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(count, generator=generator, dtype=torch.float64)
    weight = torch.rand(count, generator=generator, dtype=torch.float64) ** 4 + 1e-6
    centres = kmeans(y, weight, k)
    assert (centres.diff() > 0).all()
    assert cost(y, weight, centres) == pytest.approx(least(y, weight, k), rel=1e-6, abs=1e-14)


def test_bins_cost_next_to_nothing():
    generator = torch.Generator().manual_seed(0)
    y, weight = torch.randn(20000, generator=generator), torch.rand(20000, generator=generator)
    exact, binned = (cost(y, weight, kmeans(y, weight, 8, bins)) for bins in (32768, 1024))
    assert exact <= binned < exact * 1.001


def test_kmeans_of_few_values_and_of_none():
    y = torch.tensor([1.0, 3.0, 3.0])
    assert kmeans(y, torch.ones(3), 4).tolist() == pytest.approx([1, 3, 3, 3])
    assert kmeans(y, torch.tensor([0.0, 1.0, 1.0]), 2).tolist() == pytest.approx([3, 3])
    with pytest.raises(ValueError, match="positive weight"):
        kmeans(y, torch.zeros(3), 2)


def test_weights_pull_levels():
    y = torch.linspace(-1, 1, 1001)
    right = fitted(y, torch.where(y > 0, 1.0, 0.01), 3).values
    assert (right > 0).sum() > (right < 0).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["lloyd_max", "normal_float", "uniform"])
def test_levels_are_int8_and_codes_the_nearest(name, bits):
    book = fixed(name, bits)
    assert book.levels.dtype == torch.int8 and book.levels.abs().max() == 127
    assert book.bits == bits and (book.values.diff() >= 0).all()
    y = torch.linspace(-1.3, 1.3, 997)
    error = (book.decode(book.encode(y)) - y).abs()
    torch.testing.assert_close(error, (y[:, None] - book.values).abs().amin(1))


def test_unit_survives_float32():
    book = Codebook.of(torch.tensor([-0.7, -0.1, 0.1, 0.9]))
    assert float(torch.tensor(book.unit, dtype=torch.float32)) == book.unit


def test_gaussian_levels_are_maxs():
    half = gaussian(2).values[2:]
    torch.testing.assert_close(half, torch.tensor([0.4528, 1.510]), atol=6e-3, rtol=0)


def test_q_norm_restores_mean_and_spread():
    y = torch.randn(5000, generator=torch.Generator().manual_seed(0)) + 0.3
    book = fixed("uniform", 2)
    normed = q_norm(book, y)
    read = normed.decode(normed.encode(y))
    assert torch.equal(book.encode(y), normed.encode(y))
    assert read.mean().item() == pytest.approx(y.mean().item(), abs=0.02)
    assert read.std().item() == pytest.approx(y.std().item(), rel=0.02)
    assert book.decode(book.encode(y)).std().item() < 0.8 * y.std().item()


def test_unknown_names_and_bits():
    with pytest.raises(ValueError, match="codebook must be"):
        fixed("nuq", 4)
    with pytest.raises(ValueError, match="bits must be"):
        fixed("uniform", 5)
