import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.kernels.kvquant.reference import (
    dequantize,
    normal_float_codebook,
    pack,
    quantize,
    unpack,
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
def test_codebook_monotone(bits):
    levels = normal_float_codebook(bits)
    assert levels.dtype == torch.float32 and levels.shape == (2**bits,)
    assert levels[0] == -1 and levels[-1] == 1
    assert (levels.diff() > 0).all()


def test_codebook_is_nf4():
    published = torch.tensor(
        [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
        + [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    )
    torch.testing.assert_close(normal_float_codebook(4), published, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [1, 2])
def test_quantize_picks_the_nearest_level(bits, dim):
    torch.manual_seed(0)
    x = torch.randn(3, 64, 16) * 5 + 2
    codebook = normal_float_codebook(bits)
    codes, scale, zero = quantize(x, codebook, dim, torch.float16)
    assert scale.dtype == zero.dtype == torch.float16
    levels = codebook * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)
    best = (levels - x.unsqueeze(-1)).abs().amin(-1)
    error = (dequantize(codes, scale, zero, codebook) - x).abs()
    torch.testing.assert_close(error, best, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_quantize_constant_and_huge(bits):
    codebook = normal_float_codebook(bits)
    constant = torch.full((2, 8), 0.5)
    assert torch.equal(dequantize(*quantize(constant, codebook, 1), codebook), constant)
    huge = torch.tensor([[-1e6, 1e6] * 4])
    assert dequantize(*quantize(huge, codebook, 1), codebook).isfinite().all()


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
