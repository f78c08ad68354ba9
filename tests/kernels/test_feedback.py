import itertools

import pytest
import torch

from regraft.kernels.kvquant.codebook import fixed
from regraft.kernels.kvquant.feedback import DAMPING, feedback, turns
from regraft.kernels.kvquant.hadamard import hadamard
from regraft.kernels.kvquant.reference import encode, quantize_keys, quantize_values


def costs(heads, size, seed=0, shared=3.0):
    """Of errors of channels that the model reads together."""
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(heads, 512, size, generator=generator)
    gradient += shared * torch.randn(heads, 512, 1, generator=generator)
    return gradient.mT @ gradient / 512


def cost(fisher, error):
    return float(torch.einsum("bhtd,hde,bhte->", error, fisher, error))


def test_every_channel_has_its_turn():
    assert sorted(turns(12).tolist()) == list(range(12))
    assert turns(8).tolist() == [7, 3, 6, 2, 5, 1, 4, 0]


def test_channels_that_do_not_meet_are_rounded_alone():
    fisher = torch.diag_embed(torch.rand(2, 16) + 0.1)
    fed = feedback(fisher)
    assert not fed.matrix.any()
    expected = fisher.diagonal(dim1=1, dim2=2) + DAMPING * fisher.sum((1, 2))[:, None] / 16
    weight = (expected / expected.max()).sqrt()
    torch.testing.assert_close(fed.weight[0, :, 0].float(), weight, rtol=2e-3, atol=0)


def test_the_matrix_cancels_what_was_done():
    """An error followed by the targets it moves costs least of all continuations."""
    fisher = costs(1, 6)
    fed, order = feedback(fisher), turns(6)
    form = fisher[0] + DAMPING * fisher[0].diagonal().mean() * torch.eye(6)
    form = form[order][:, order]
    error = torch.zeros(6)
    error[0] = 1.0
    for j in range(1, 6):
        error[j] = -(error[:j] @ fed.matrix[0, :j, j])
    best = -torch.linalg.solve(form[1:, 1:], form[1:, 0])
    torch.testing.assert_close(error[1:], best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_cost_less_than_rounding_and_little_more_than_the_best(bits):
    fisher, book = costs(1, 4, shared=2.0), fixed("uniform", bits)
    x = torch.rand(1, 1, 40, 4, generator=torch.Generator().manual_seed(bits)) * 1.8 - 0.9
    one, zero = torch.ones(1, 1, 1, 4).half(), torch.zeros(1, 1, 1, 4).half()
    plain = encode(x, one, zero, book)[2]
    fed = encode(x, one, zero, book, feedback(fisher))[2]
    every = torch.tensor(list(itertools.product(book.values.tolist(), repeat=4)))
    errors = x[0, 0, :, None] - every
    best = torch.einsum("tnd,de,tne->tn", errors, fisher[0], errors).amin(1).sum().item()
    assert best <= cost(fisher, x - fed) < 0.6 * cost(fisher, x - plain)
    assert cost(fisher, x - fed) < 3 * best


@pytest.mark.parametrize("kind", ["key", "value"])
def test_outliers_and_feedback_work_together(kind):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 2, 96, 16, generator=generator)
    x[:, :, ::7, 3] *= 6
    fisher, book = costs(2, 16), fixed("lloyd_max", 3)
    scale, zero = (torch.full((1, 2, 1, 16), value).half() for value in (2.5, 0.0))

    def read(share, fed):
        if kind == "key":
            codes, residual = quantize_keys(x, scale, zero, book, share, fed)
            wide = scale, zero
        else:
            codes, *wide, residual = quantize_values(x, book, share, fed)
            wide = [part[:, None, :, None] for part in wide]
        out = book.decode(codes) * wide[0].float() + wide[1].float()
        return out if residual is None else out + residual.float()

    plain, kept = cost(fisher, x - read(0, None)), cost(fisher, x - read(3, None))
    fed = cost(fisher, x - read(3, feedback(fisher, scale if kind == "key" else None)))
    assert fed < 0.5 * kept < 0.5 * plain
    every = read(32, feedback(fisher, scale if kind == "key" else None))
    torch.testing.assert_close(every, x, rtol=1e-3, atol=1e-3)


def test_constant_channels_take_no_part():
    fisher, scale = costs(1, 8), torch.ones(1, 1, 1, 8).half()
    scale[..., 5] = 0
    fed, place = feedback(fisher, scale), turns(8).tolist().index(5)
    assert not fed.matrix[:, place].any() and not fed.matrix[:, :, place].any()
    assert (fed.weight > 0).all() and fed.matrix.isfinite().all()


@pytest.mark.parametrize("size", [2, 16, 64, 80, 96])
def test_hadamard_is_orthogonal_and_its_own_inverse(size):
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size))
    assert torch.equal(matrix, matrix.mT)
