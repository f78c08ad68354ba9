from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regraft.kernels.attention.reference import attention
from regraft.kernels.kvquant.codebook import fixed
from regraft.kernels.kvquant.layout import (
    LAYOUTS,
    PLANES,
    pack,
    pack_table,
    unpack,
    unpack_table,
)
from regraft.kernels.kvquant.reference import (
    Body,
    Packed,
    attend,
    cap,
    dequantize,
    encode,
    pack_outliers,
    quantize_keys,
    quantize_values,
    ranges,
    unpack_outliers,
)
from regraft.kernels.rotary.reference import rotate

KINDS = ("key", "value")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(kind, x, bits, share=0.0, layout="llvm", scale_by=1.0):
    """Packed x [B, H, T, D]; keys between ranges over all tokens, narrowed by scale_by."""
    book, count = fixed("uniform", bits), cap(share, x.shape[1] * x.shape[3])
    if kind == "key":
        scale, zero = ranges(x, (0, 2))
        scale = (scale * scale_by).half()
        codes, residual = quantize_keys(x, scale, zero, book, count)
    else:
        codes, scale, zero, residual = quantize_values(x, book, count)
        scale, zero = (part.unflatten(1, (-1, 32)) for part in (scale, zero))
    outliers = (None, None) if residual is None else pack_outliers(residual, count)
    codes = pack(codes.unflatten(2, (-1, 32)), bits, kind, layout)
    size = x.shape[3]
    return Packed(kind, bits, size, layout, codes, scale, zero, book.levels, book.unit, *outliers)


@given(
    st.sampled_from(sorted(PLANES)),
    st.sampled_from([16, 64, 80, 96, 128, 256]),
    st.sampled_from(LAYOUTS),
    st.sampled_from(KINDS),
    st.integers(0, 2**31),
)
def test_unpack_undoes_pack(bits, size, layout, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (2, 1, 32, size), generator=generator, dtype=torch.uint8)
    words = pack(codes, bits, kind, layout)
    assert words.shape == (2, 1, 32 * size * bits // 8) and words.dtype == torch.uint8
    assert torch.equal(unpack(words, bits, size, kind, layout), codes)


def test_places_of_four_bit_codes():
    codes = torch.randint(16, (32, 128), dtype=torch.uint8)
    pair = codes[5, 7] | codes[5, 71] << 4
    byte = int(pack(codes, 4, "key", "cuda").view(4, 32, 16)[1, 23, 7])
    assert [byte & 15, byte >> 4] == codes[29, 86:88].tolist()
    assert pack(codes, 4, "key", "llvm").view(64, 32)[7, 5] == pair
    word = int(pack(codes, 4, "value", "llvm").view(torch.int16).view(4, 128, 2)[1, 9, 1])
    assert [word >> 4 * k & 15 for k in range(4)] == codes[9:17:2, 9].tolist()
    word = int(pack(codes, 4, "value", "cuda").view(torch.int32).view(4, 32, 4)[2, 23, 1])
    tokens = [8 * j + 6 + e for j in range(4) for e in range(2)]
    assert [word >> 4 * i & 15 for i in range(8)] == codes[tokens, 77].tolist()


@pytest.mark.parametrize(
    ("kind", "layout", "size"), [("key", "llvm", 12), ("key", "cuda", 24), ("value", "cuda", 24)]
)
def test_head_sizes_that_do_not_pack(kind, layout, size):
    with pytest.raises(ValueError, match=f"head of {size} channels"):
        pack(torch.zeros(32, size, dtype=torch.uint8), 4, kind, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotation_table(layout):
    cos, sin = random(2, 64, 8).clamp(-1, 1), random(2, 64, 8, seed=1).clamp(-1, 1)
    for turn, found in zip(
        (cos, sin), unpack_table(pack_table(cos, sin, layout), layout), strict=True
    ):
        torch.testing.assert_close(found, turn, atol=5e-4, rtol=0)


@pytest.mark.parametrize("share", [0.01, 0.2, 1.0])
def test_outliers_come_back(share):
    residual = random(2, 3, 64, 16)
    count = cap(share, 48)
    flat = residual.transpose(1, 2).flatten(2)
    kept = torch.zeros_like(flat).scatter(-1, flat.abs().topk(count, -1)[1], 1.0)
    residual = (flat * kept).unflatten(2, (3, 16)).transpose(1, 2).half()
    entries, offsets = pack_outliers(residual, count)
    assert entries.shape == (2, 2, 32 * count) and offsets.shape == (2, 2, 4)
    assert (offsets[..., -1] == 32 * count).all()
    like = packed("value", random(2, 3, 64, 16), 4)
    like.outliers, like.offsets = entries, offsets
    assert torch.equal(unpack_outliers(like, 2), residual.float())


@pytest.mark.parametrize(("kind", "shift"), [("key", 24), ("value", 16)])
def test_cuda_outliers_are_sorted_by_what_they_are_added_to(kind, shift):
    residual = torch.randn(1, 2, 64, 16) * (torch.rand(1, 2, 64, 16) < 0.2)
    entries, offsets = pack_outliers(residual, 16, kind, "cuda")
    for block in range(2):
        for low, high in offsets[0, block].unfold(0, 2, 1).tolist():
            places = entries[0, block, low:high] >> shift & 255
            assert high > low and (places.diff() >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_half_a_step(kind, bits):
    x = random(2, 3, 64, 16) * random(1, 3, 1, 16, seed=1)
    body = Body(packed("key", x, bits), packed("value", x, bits), 2)
    scale = body.key.scale if kind == "key" else body.value.scale.flatten(1)[:, None, :, None]
    step = scale.float() * 2 / (2**bits - 1)
    slack = 1.02 * step / 2 + 0.01 * scale.float() + 1e-3
    assert ((dequantize(body, kind) - x).abs() <= slack).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_outliers_are_the_identity(layout):
    x = random(2, 3, 64, 16)
    keys = packed("key", x, 2, 1.0, layout, scale_by=0.0)
    body = Body(keys, packed("value", x, 2, 1.0, layout), 2)
    for kind in KINDS:
        torch.testing.assert_close(dequantize(body, kind), x, rtol=1e-3, atol=1e-3)


def test_outliers_are_the_furthest_and_at_most_count():
    k = random(1, 2, 32, 8)
    k[0, 1, 3, 5], k[0, 0, 3, 2], k[0, 0, 3, 1] = 50.0, -40.0, 30.0
    scale, zero = torch.full((1, 2, 1, 8), 3.5).half(), torch.zeros(1, 2, 1, 8).half()
    _, residual = quantize_keys(k, scale, zero, fixed("uniform", 4), 2)
    assert residual[0, 1, 3, 5] == 46.5 and residual[0, 0, 3, 2] == -36.5
    assert residual[0, 0, 3, 1] == 26.5 and residual.count_nonzero() <= 64
    v = random(1, 2, 32, 8)
    v[0, 0, 4, 0], v[0, 1, 4, 1], v[0, 1, 4, 2] = 90.0, 80.0, -70.0
    _, scale, zero, residual = quantize_values(v, fixed("uniform", 4), 3)
    assert scale[0, 4] < 4 and residual[0, :, 4].count_nonzero() == 3


def test_constant_and_huge_values():
    x = torch.full((1, 2, 32, 8), 3.25)
    x[0, 0, :, 0] = 6e4
    body = Body(packed("key", x, 2), packed("value", x, 2, 0.125), 1)
    assert torch.equal(dequantize(body, "key"), x)
    torch.testing.assert_close(dequantize(body, "value"), x, rtol=1e-3, atol=0.0)


def test_encode_reads_levels_apart_from_midpoints():
    book = SimpleNamespace(
        midpoints=torch.tensor([0.0]),
        levels=torch.tensor([-100, 50], dtype=torch.int8),
        unit=0.01,
    )
    one, zero = torch.ones(1).half(), torch.zeros(1).half()
    codes, _, read = encode(torch.tensor([-0.1, 0.1]), one, zero, book)
    assert codes.tolist() == [0, 1] and read.tolist() == [-1.0, 0.5]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("groups", [1, 3])
def test_attend_is_attention_over_what_is_read(layout, rows, groups):
    k, v = random(2, 2, 96, 16), random(2, 2, 96, 16, seed=1)
    exact_key, exact_value = random(2, 2, 5, 16, seed=2), random(2, 2, 5, 16, seed=3)
    angle = random(1, 96, 8, seed=4)
    table = pack_table(angle.cos(), angle.sin(), layout)
    body = Body(
        packed("key", k, 3, 0.05, layout, 0.7), packed("value", v, 2, 0.05, layout), 2, 0, table
    )
    q, sinks = random(2, 2 * groups, rows, 16, seed=5), random(2 * groups, seed=6)
    first = torch.tensor([[0] * rows, [7] * rows], dtype=torch.int32)
    exact_mask = torch.zeros(2, rows, 5)
    exact_mask[1, :, 2] = float("-inf")
    out = attend(q, body, exact_key, exact_value, exact_mask, first, sinks, 0.3)
    cos, sin = (turn[:, :64] for turn in unpack_table(table, layout))
    keys = torch.cat((rotate(dequantize(body, "key"), cos, sin), exact_key), 2)
    values = torch.cat((dequantize(body, "value"), exact_value), 2)
    mask = torch.ones(2, 1, rows, 69, dtype=torch.bool)
    mask[1, :, :, :7], mask[1, :, :, 66] = False, False
    torch.testing.assert_close(out, attention(q, keys, values, mask, 0.3, 0.0, sinks))
