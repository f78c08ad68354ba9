import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.kernels.kvquant.grouped import (
    CODEBOOKS,
    codebook,
    dequantize,
    look_up,
    pack,
    quantize,
    unpack,
    word_table,
)
from regraft.kernels.rotary.reference import rotate

BITS = [2, 3, 4, 8]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 3), st.integers(1, 9), st.integers(0, 2**31))
def test_pack_round_trip(bits, rows, words, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 8 * words)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, words * bits)
    assert torch.equal(unpack(packed, bits, 8 * words), codes)


def test_pack_rejects_odd_sizes():
    with pytest.raises(ValueError, match="multiple of 8"):
        pack(torch.zeros(7, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="bits"):
        pack(torch.zeros(8, dtype=torch.uint8), 5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", CODEBOOKS)
def test_codebook_ascends_within_the_range(name, bits):
    levels = codebook(name, bits)
    assert levels.dtype == torch.float32 and levels.shape == (2**bits,)
    assert (levels.diff() > 0).all() and levels.abs().max() <= 1


def test_normal_float_is_nf4():
    published = torch.tensor(
        [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
        + [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    )
    torch.testing.assert_close(codebook("normal_float", 4), published, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="codebook must be one of"):
        codebook("normal", 4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_max_levels_are_the_means_of_their_cells(bits):
    x = torch.randn(20000, 64, generator=torch.Generator().manual_seed(1))
    half = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 2
    y = ((x - x.amin(1, keepdim=True)) / half - 1).flatten()
    weight = half.square().expand_as(x).flatten()
    levels = codebook("lloyd_max", bits)
    cell = torch.bucketize(y, (levels[1:] + levels[:-1]) / 2)
    zeros = torch.zeros_like(levels)
    mean = zeros.index_add(0, cell, y * weight) / zeros.index_add(0, cell, weight)
    torch.testing.assert_close(levels, mean, atol=2e-3, rtol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [1, 2, (0, 2)])
def test_quantize_picks_the_nearest_level(bits, dim):
    torch.manual_seed(0)
    x = torch.randn(3, 64, 16) * 5 + 2
    levels = codebook("lloyd_max", bits)
    codes, scale, zero = quantize(x, levels, dim, torch.float16)
    assert scale.dtype == zero.dtype == torch.float16
    every = levels * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)
    best = (every - x.unsqueeze(-1)).abs().amin(-1)
    error = (dequantize(codes, scale, zero, levels) - x).abs()
    torch.testing.assert_close(error, best, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_quantize_constant_and_huge(bits):
    levels = codebook("lloyd_max", bits)
    constant = torch.full((2, 8), 0.5)
    assert torch.equal(dequantize(*quantize(constant, levels, 1), levels), constant)
    huge = torch.tensor([[-1e6, 1e6] * 4])
    assert dequantize(*quantize(huge, levels, 1), levels).isfinite().all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", CODEBOOKS)
def test_look_up_equals_unpacking(name, bits):
    codes = torch.randint(0, 2**bits, (2, 3, 24), dtype=torch.uint8)
    values = look_up(pack(codes, bits), word_table(name, bits))
    assert torch.equal(values, codebook(name, bits)[codes.int()])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("size", "offset"), [(16, 0), (8, 0), (8, 8), (6, 3)])
@pytest.mark.parametrize("batch", [1, 2])
def test_rotate_is_complex_multiplication(interleaved, size, offset, batch):
    torch.manual_seed(1)
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    angle = torch.randn(batch, 5, size // 2, dtype=torch.float64)
    out = rotate(x, angle.cos(), angle.sin(), interleaved, offset)
    part = x[..., offset : offset + size]
    pairs = part.unflatten(-1, (-1, 2)) if interleaved else part.unflatten(-1, (2, -1)).mT
    turned = torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angle).unsqueeze(1)
    turned = torch.view_as_real(turned)
    expected = x.clone()
    expected[..., offset : offset + size] = (turned if interleaved else turned.mT).flatten(-2)
    torch.testing.assert_close(out, expected)
