import gguf
import numpy as np
import pytest
import torch

from regraft.kernels.linear.formats import Format, check, dequantize, pack, parse, unpack
from regraft.kernels.linear.gguf import BLOCKS, columns, tiles
from regraft.kernels.linear.rounding import round_to_nearest
from regraft.program import RegraftError
from tests.gguf_files import random_blocks
from tests.kernels.linear.packed import FORMATS, random_packed


@pytest.mark.parametrize("name", FORMATS)
def test_pack_is_undone(name):
    format = parse(name)
    assert format.name == name
    codes, parts = unpack(random_packed(name, 37, 512), format, 512)
    again = pack(format, codes, **parts)
    check(again, name, 48, 512)
    codes_again, parts_again = unpack(again, format, 512)
    assert torch.equal(codes, codes_again) and codes[:37].max() == 2**format.bits - 1
    assert all(torch.equal(x, parts_again[part]) for part, x in parts.items())


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_gguf_are_read_exactly(kind):
    raw = random_blocks(kind, 37, 512, np.random.default_rng(0))
    wanted = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert columns(kind, raw.shape[1]) == 512
    packed = tiles(kind, torch.from_numpy(raw))
    assert np.array_equal(dequantize(packed, BLOCKS[kind].name, 37, 512).numpy(), wanted)
    assert packed.nbytes <= raw.nbytes * 48 / 37 * 1.03


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_without_finite_scales(kind):
    raw = torch.from_numpy(random_blocks(kind, 16, 256, np.random.default_rng(0)))
    start = 208 if kind == "Q6_K" else 0
    raw[3, start : start + 2] = torch.tensor([float("nan")]).half().view(torch.uint8)
    with pytest.raises(RegraftError, match="here holds weights that are no finite"):
        tiles(kind, raw, "here")


@pytest.mark.parametrize(
    "format",
    [Format(8, 0), Format(8, 32), Format(8, 128), Format(4, 32, True), Format(4, 64, True)],
)
def test_rounding_errs_by_half_a_step(format):
    weight = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    packed, error = round_to_nearest(weight, format)
    back = dequantize(packed, format.name, 50, 256)
    groups = weight.view(50, format.groups(256), -1)
    ranges = groups.amax(2) - groups.amin(2) if format.zero else 2 * groups.abs().amax(2)
    step = ranges / (2**format.bits - (1 if format.zero else 2))
    limit = (0.51 * step + 2e-3 * groups.abs().amax(2)).unsqueeze(2)
    assert ((back - weight).view_as(groups).abs() <= limit).all()
    assert error == pytest.approx(float((back - weight).norm() / weight.norm()), rel=1e-4)
    assert error > 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("format", [Format(8, 32), Format(4, 32, True)])
def test_weights_that_cannot_be_rounded(bad, format):
    weight = torch.ones(4, 64)
    weight[2, 5] = bad
    with pytest.raises(RegraftError, match="finite|range"):
        round_to_nearest(weight, format)


def test_groups_that_do_not_divide():
    with pytest.raises(RegraftError, match="48 columns do not divide into groups of 32"):
        round_to_nearest(torch.ones(4, 48), Format(8, 32))
    packed, error = round_to_nearest(torch.ones(4, 45), Format(8, 0))
    assert error < 1e-3 and dequantize(packed, "int8", 4, 45).shape == (4, 45)


@pytest.mark.parametrize("name", ["int5", "int8g7", "int6", "int6g32", "int4g64n", "x", ""])
def test_unknown_formats(name):
    with pytest.raises(RegraftError, match="unknown format"):
        parse(name)
