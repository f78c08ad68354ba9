import math

import pytest
import torch

from regraft.kernels.compiled import LEVELS, KernelError, cpu_level
from regraft.kernels.linear import llvm
from regraft.kernels.linear.formats import dequantize, pack, parse, unpack
from tests.kernels.linear.packed import FORMATS, random_packed

pytest.importorskip("tvm")
HERE = [level for level in LEVELS if list(LEVELS).index(level) >= list(LEVELS).index(cpu_level())]


def case(format, rows, columns, count, bias=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, columns, generator=generator) * torch.logspace(-2, 2, count)[:, None]
    added = torch.randn(rows, generator=generator) if bias else None
    return x, random_packed(format, rows, columns), added


def check(x, packed, bias, format, rows, level=None, bound=2e-4):
    """The largest error of a row is a share of what its terms add up to."""
    weight = dequantize(packed, format, rows, x.shape[1]).double()
    wanted = x.double() @ weight.t() + (0 if bias is None else bias.double())
    out = llvm.linear(x, packed, bias, format, rows, level)
    assert out.shape == wanted.shape
    assert ((out - wanted).norm(dim=1) <= bound * wanted.norm(dim=1)).all()


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("format", FORMATS)
def test_equals_the_dequantised_product(level, format):
    sizes = ((100, 512, 1), (16, 256, 2), (33, 768, 5))
    for rows, columns, count in sizes[: 1 if level == "portable" else 3]:
        check(*case(format, rows, columns, count), format, rows, level)


@pytest.mark.parametrize("level", HERE)
def test_every_number_of_rows_and_a_bias(level):
    for count in range(1, 17):
        check(*case("int4g32z", 50, 256, count, bias=True), "int4g32z", 50, level)


@pytest.mark.parametrize("columns", [1, 31, 33, 100])
def test_whole_rows_of_any_length(columns):
    check(*case("int8", 20, columns, 3), "int8", 20)


def test_large_vocabulary():
    check(*case("int8g32", 49152 + 5, 64, 1), "int8g32", 49152 + 5)


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("format", ["int8g32", "int4g32", "int6g16n"])
def test_extreme_codes(level, format):
    """The largest sums that codes and activations can make stay exact."""
    kind = parse(format)
    parts = unpack(random_packed(format, 16, 256), kind, 256)[1]
    for code in (0, 2**kind.bits - 1):
        packed = pack(kind, torch.full((16, 256), code, dtype=torch.uint8), **parts)
        x = torch.full((1, 256), -3.0)
        check(x, packed, None, format, 16, level)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none(bad):
    x, packed, _ = case("int4g32z", 16, 64, 2)
    x[1, 40] = bad
    out = llvm.linear(x, packed, None, "int4g32z", 16)
    assert out[0].isfinite().all() and not out[1].isfinite().any()


def test_activations_of_any_scale():
    for scale in (0.0, 1e-38, 1e-20, 1e30):
        x, packed, _ = case("int8g32", 16, 64, 1)
        out = llvm.linear(x * scale, packed, None, "int8g32", 16)
        wanted = x.double() * scale @ dequantize(packed, "int8g32", 16, 64).double().t()
        assert (out - wanted).norm() <= 1e-4 * wanted.norm() + 1e-35


def test_threads_share_the_tiles():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check(*case("int4g32", 1000, 128, 4), "int4g32", 1000)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("format", FORMATS)
def test_tiles_are_dequantised(level, format):
    packed = random_packed(format, 100, 256)
    wanted = dequantize(packed, format, 100, 256)[32:96].t()
    torch.testing.assert_close(
        llvm.unpacked(packed, format, 256, range(2, 6), level), wanted, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("format", ["float16", "bfloat16"])
def test_weights_of_half_precision(level, format):
    weight = torch.randn(37, 48, generator=torch.Generator().manual_seed(0))
    weight, bias = weight.to(getattr(torch, format)), torch.randn(37)
    for count in (1, 2, 5, 16):
        check(torch.randn(count, 48), weight, bias, format, 37, level, bound=1e-6)
    with pytest.raises(KernelError, match="no CPU kernel for 40 columns"):
        llvm.linear(torch.randn(1, 40), weight[:, :40].contiguous(), None, format, 37, level)
