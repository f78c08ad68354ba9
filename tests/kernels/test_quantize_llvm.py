import math

import pytest
import torch

from regraft.kernels.compiled import LEVELS, KernelError, cpu_level
from regraft.kernels.kvquant import reference
from regraft.kernels.kvquant.codebook import fixed
from regraft.kernels.kvquant.feedback import feedback
from regraft.kernels.kvquant.llvm.quantizing import quantize
from regraft.kernels.kvquant.reference import Body, dequantize
from tests.kernels.test_kvquant import random

pytest.importorskip("tvm")
HERE = [level for level in LEVELS if list(LEVELS).index(level) >= list(LEVELS).index(cpu_level())]


PARTS = ("codes", "scale", "zero", "outliers", "offsets")


def same(found, expected):
    for part in PARTS:
        one, other = getattr(found, part), getattr(expected, part)
        assert (one is None) == (other is None), part
        if one is not None:
            assert one.dtype == other.dtype
            assert torch.equal(one, other), (part, (one != other).sum())


def costs(heads, size):
    """What errors cost: channels that go together, some more than others."""
    gradient = random(heads, 2 * size, size, seed=9) * random(heads, 1, size, seed=10)
    gradient += 3 * random(heads, 2 * size, 1, seed=11) * random(heads, 1, size, seed=12)
    return gradient.mT @ gradient


def key_scales(heads, size, batch=1, groups=1):
    """Scales with some normal keys outside; zeros and costs of errors differ by channel."""
    scale = 2.5 * (1 + 0.1 * random(batch, heads, groups, size, seed=7).clamp(-5, 5))
    zero = 0.1 * random(batch, heads, groups, size, seed=8)
    return scale.half(), zero.half(), feedback(costs(heads, size), scale[:1, :, :1])


def arguments(kind, x, bits, share, rows=None, name="lloyd_max"):
    """Of ``quantize``; rows: scale, zero and perhaps feedback of keys, else those of key_scales.
    Values have feedback where keys have."""
    scales = rows or key_scales(x.shape[1], x.shape[3])
    if kind == "value":
        scales = (None, None, *(feedback(costs(x.shape[1], x.shape[3])) for _ in scales[2:]))
    return kind, x, fixed(name, bits), bits, share, "llvm", *scales


def check(*args, level=None, **settings):
    for kind in ("key", "value"):
        given = arguments(kind, *args, **settings)
        same(quantize(*given, level=level), reference.quantize(*given))


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


@pytest.mark.parametrize("group", [32, 64, 192])
def test_groups_of_keys_in_batches(group):
    check(random(3, 2, 192, 64), 4, 0.01, rows=key_scales(2, 64, 3, 192 // group))


def test_without_feedback():
    check(random(1, 3, 64, 64), 4, 0.01, rows=key_scales(3, 64)[:2])


@pytest.mark.parametrize("name", ["uniform", "normal_float"])
def test_codebooks(name):
    check(random(1, 2, 32, 64), 4, 0.01, name=name)


def test_every_value_an_outlier():
    scale, zero, fed = key_scales(2, 64)
    check(random(1, 2, 32, 64), 2, 1.0, rows=(scale * 0, zero, fed))


def test_errors_of_few_tokens():
    x = random(1, 3, 64, 64)
    x[:, :, 40:43] *= 20
    check(x, 4, 0.01)


def test_constant_channels():
    x = random(2, 3, 64, 64)
    x[:, 1, :, 5:40] = 0.25
    scale, zero, fed = key_scales(3, 64)
    scale[:, 1, :, 5:40], zero[:, 1, :, 5:40] = 0, 0.25
    scale[:, 2, :, :3] = 0
    check(x, 4, 0.01, rows=(scale, zero, fed))


def test_constant_tokens():
    x = random(2, 3, 64, 64)
    x[:, :, 7] = -1.5
    x[1, :, 40] = 0
    check(x, 4, 0.01, rows=key_scales(3, 64)[:2])
    made = quantize(*arguments("value", x, 4, 0.01))
    body = Body(made, made, 2)
    assert torch.equal(dequantize(body, "value")[:, :, 7], torch.full((2, 3, 64), -1.5))


def test_of_equal_outliers_the_first_and_none_twice():
    x = torch.full((1, 2, 32, 64), 3.3)
    one = torch.ones(1, 2, 1, 64).half()
    keys = quantize("key", x, fixed("uniform", 4), 4, 0.04, "llvm", one, one * 0)
    assert (keys.offsets == torch.tensor([0, 192, 192])).all()
    first = torch.arange(192) // 64 << 8 | torch.arange(192) % 64
    assert torch.equal((keys.outliers[0, 0] >> 16).long(), first)
    values = quantize("value", x, fixed("uniform", 4), 4, 0.035, "llvm")
    assert (values.scale == 0).all() and (values.zero == 3.3).all()
    assert (values.offsets == torch.tensor([0, 96, 160])).all()
    channels = (values.outliers[0, 0] >> 16 & 255).tolist()
    assert channels == [0, 1, 2] * 32 + [62, 63] * 32


@pytest.mark.parametrize("level", HERE)
def test_huge_and_tiny_values(level):
    x = random(2, 3, 64, 64)
    x[:, 0, ::3, 4] *= 6e4
    x[:, 2, ::5, 60] *= -3e4
    x[:, 1, 11:30] *= 1e-6
    x[:, 1, 8, 8] = 3e9
    check(x, 3, 0.03, level=level)


def test_strided_slices():
    room = random(4, 5, 200, 70, seed=3)
    x = room[::2, 1:4, 7:135, 3:67]
    check(x, 4, 0.01)
    check(x.mT.contiguous().mT, 3, 0.01)
    check(x.transpose(1, 2).contiguous().transpose(1, 2), 2, 0.0)


def test_half_precision():
    check(random(1, 3, 64, 64).bfloat16(), 4, 0.0)


@pytest.mark.parametrize("kind", ["key", "value"])
def test_threads_change_nothing(kind):
    given, before = arguments(kind, random(2, 3, 320, 64), 4, 0.01), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = quantize(*given)
        torch.set_num_threads(3)
        same(quantize(*given), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["key", "value"])
def test_what_is_no_number_stays_in_its_place(kind):
    """Outliers are at most count, whatever the data is."""
    x = random(1, 2, 64, 64)
    x[0, 0, 3], x[0, 1, 9, ::2], x[0, 0, 12, 5], x[0, 1, 40, 7] = (
        math.nan, math.nan, math.inf, -math.inf,
    )  # fmt: skip
    made = quantize(*arguments(kind, x, 4, 0.01))
    assert (made.offsets.diff() >= 0).all() and (made.offsets[..., -1] <= 64).all()


@pytest.mark.parametrize(
    ("bits", "size", "layout"), [(8, 64, "llvm"), (4, 72, "llvm"), (4, 64, "cuda")]
)
def test_shapes_without_a_kernel(bits, size, layout):
    x = random(1, 1, 32, size)
    with pytest.raises(KernelError, match="no CPU kernel"):
        quantize("value", x, fixed("uniform", bits), bits, 0.01, layout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize(
    "target",
    [{"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]}, LEVELS["avx512"]],
    ids=["aarch64", "avx512"],
)
def test_compiles_for_other_processors(target, kind):
    import tvm

    from regraft.kernels.kvquant.llvm.block import Shape
    from regraft.kernels.kvquant.llvm.packing import make

    made = tvm.IRModule({"quantize": make(Shape(kind, 3, 64, 3, 2, kind == "key"))})
    with tvm.transform.PassContext(opt_level=3):
        built = tvm.compile(made, tvm.target.Target(target))
    assert "fdiv" in (text := built.mod.inspect_source("asm")) or "vdivps" in text
