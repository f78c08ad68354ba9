import math

import pytest
import torch

from regraft.kernels.compiled import LEVELS, KernelError, cpu_level
from regraft.kernels.kvquant import reference
from regraft.kernels.kvquant.codebook import fixed
from regraft.kernels.kvquant.layout import pack
from regraft.kernels.kvquant.llvm import append_keys, append_values
from tests.kernels.test_kvquant import random

pytest.importorskip("tvm")
HERE = [level for level in LEVELS if list(LEVELS).index(level) >= list(LEVELS).index(cpu_level())]


def packed(kind, codes, bits, residual, count):
    codes = pack(codes.unflatten(2, (-1, 32)), bits, kind, "llvm")
    found = (None, None) if residual is None else reference.pack_outliers(residual, count)
    return codes, *found


def expected_keys(x, scale, zero, book, bits, group=0, count=0):
    if group:
        scale, zero = (s.repeat_interleave(group, 2)[:, :, : x.shape[2]] for s in (scale, zero))
    codes, residual = reference.quantize_keys(x, scale, zero, book, count)
    return packed("key", codes, bits, residual, count)


def expected_values(x, book, bits, count=0):
    codes, scale, zero, residual = reference.quantize_values(x, book, count)
    codes, *found = packed("value", codes, bits, residual, count)
    return codes, scale.unflatten(1, (-1, 32)), zero.unflatten(1, (-1, 32)), *found


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            assert torch.equal(one, other), (one != other).sum()


def key_scales(heads, size, batch=1, groups=1, reach=2.5):
    """Scales that leave about a hundredth of normal keys outside, zeros apart by channel."""
    scale = reach * (1 + 0.1 * random(batch, heads, groups, size, seed=7).clamp(-5, 5))
    return scale.half(), (0.1 * random(batch, heads, groups, size, seed=8)).half()


def check(x, bits, share, group=0, scales=None, level=None, book=None):
    batch, heads, length, size = x.shape
    count, book = reference.cap(share, heads * size), book or fixed("lloyd_max", bits)
    groups = -(-length // group) if group else 1
    scale, zero = scales or key_scales(heads, size, batch if group else 1, groups)
    same(
        append_keys(x, scale, zero, book, bits, group, count, level),
        expected_keys(x, scale, zero, book, bits, group, count),
    )
    same(append_values(x, book, bits, count, level), expected_values(x, book, bits, count))


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize(("bits", "share"), [(2, 0.0), (2, 0.01), (3, 0.01), (4, 0.01)])
def test_equals_reference(level, bits, share):
    check(random(2, 3, 96, 64), bits, share, level=level)


@pytest.mark.slow
@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.2])
def test_all_head_sizes_and_shares(level, bits, size, share):
    check(random(1, 5, 64, size), bits, share, level=level)


@pytest.mark.parametrize(("heads", "share"), [(1, 0.01), (1, 0.2), (8, 0.01), (3, 0.05)])
def test_number_of_outliers(heads, share):
    check(random(1, heads, 64, 128), 4, share)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups_of_keys_in_batches(group):
    check(random(3, 2, 192, 64), 4, 0.01, group)


@pytest.mark.parametrize("name", ["uniform", "normal_float"])
def test_codebooks(name):
    check(random(1, 2, 32, 64), 4, 0.01, book=fixed(name, 4))


def test_every_value_an_outlier():
    x, (_, zero) = random(1, 2, 32, 64), key_scales(2, 64)
    check(x, 2, 1.0, scales=(torch.zeros_like(zero), zero))


def test_all_outside_keeps_the_furthest():
    check(random(1, 3, 64, 64) + 20, 4, 0.01)


def test_constant_channels():
    x = random(2, 3, 64, 64)
    x[:, 1, :, 5:40] = 0.25
    scale, zero = key_scales(3, 64)
    scale[:, 1, :, 5:40], zero[:, 1, :, 5:40] = 0, 0.25
    scale[:, 2, :, :3] = 0
    check(x, 4, 0.01, scales=(scale, zero))


def test_constant_tokens():
    x, book = random(2, 3, 64, 64), fixed("lloyd_max", 4)
    x[:, :, 7] = -1.5
    x[1, :, 40] = 0
    same(append_values(x, book, 4, 2), expected_values(x, book, 4, 2))


def test_equal_outliers_are_the_first_and_never_twice():
    x = torch.full((1, 2, 32, 64), 3.3)
    book, (scale, zero) = fixed("uniform", 4), key_scales(2, 64)
    _, entries, offsets = append_keys(x, scale * 0 + 1, zero * 0, book, 4, 0, 5)
    assert (offsets == torch.tensor([0, 160, 160])).all()
    assert torch.equal(entries[0, 0] >> 16 & 255, torch.arange(5).repeat(32))
    _, scale, zero, entries, offsets = append_values(x, book, 4, 5)
    assert (scale == 0).all() and (zero == 3.3).all()
    assert (offsets == torch.tensor([0, 96, 160])).all()
    channels = (entries[0, 0] >> 16 & 255).tolist()
    assert channels == [0, 1, 2] * 32 + [62, 63] * 32


@pytest.mark.parametrize("level", HERE)
def test_huge_and_tiny_values(level):
    x = random(2, 3, 64, 64)
    x[:, 0, ::3, 4], x[:, 2, ::5, 60], x[:, 1, 8, 8] = 6e4, -6e4, 3e9
    x[:, 1, 11:30] *= 1e-6
    check(x, 3, 0.03, level=level)


def test_strided_slices():
    room = random(4, 5, 200, 70, seed=3)
    x = room[::2, 1:4, 7:135, 3:67]
    assert not x.is_contiguous()
    check(x, 4, 0.01)
    check(x.mT.contiguous().mT, 3, 0.01)
    check(x.transpose(1, 2).contiguous().transpose(1, 2), 2, 0.0)


def test_half_precision():
    """Its values meet ties only in what is no outlier."""
    check(random(1, 3, 64, 64).bfloat16(), 4, 0.0)


def test_threads_change_nothing():
    x, before, book = random(2, 3, 320, 64), torch.get_num_threads(), fixed("lloyd_max", 4)
    try:
        torch.set_num_threads(1)
        one = append_values(x, book, 4, 2)
        torch.set_num_threads(3)
        same(append_values(x, book, 4, 2), one)
    finally:
        torch.set_num_threads(before)


def test_no_number_stays_in_its_place():
    """Outliers are at most count, and entries lie inside their block, whatever the data is."""
    x = random(1, 2, 64, 64)
    x[0, 0, 3], x[0, 1, 9, ::2], x[0, 0, 12, 5], x[0, 1, 40, 7] = (
        math.nan, math.nan, math.inf, -math.inf,
    )  # fmt: skip
    book, scales = fixed("lloyd_max", 4), key_scales(2, 64)
    for *_, offsets in (
        append_keys(x, *scales, book, 4, 0, 2),
        append_values(x, book, 4, 2),
    ):
        assert (offsets.diff() >= 0).all() and (offsets[..., -1] <= 64).all()


@pytest.mark.parametrize(("bits", "size", "count"), [(8, 64, 0), (4, 72, 0), (4, 1024, 600)])
def test_shapes_without_a_kernel(bits, size, count):
    x, scales = random(1, 1, 32, size), key_scales(1, size)
    book = fixed("uniform", bits)
    with pytest.raises(KernelError, match="no CPU kernel"):
        append_keys(x, *scales, book, bits, 0, count)
    with pytest.raises(KernelError, match="no CPU kernel"):
        append_values(x, book, bits, count)
