import math

import pytest
import torch

from regraft.kernels.compiled import LEVELS, KernelError, cpu_level
from regraft.kernels.kvquant import reference
from regraft.kernels.kvquant.layout import pack_table
from regraft.kernels.kvquant.llvm import attend
from regraft.kernels.kvquant.reference import Body
from tests.kernels.test_kvquant import packed, random

pytest.importorskip("tvm")
BOUND = 2e-3
HERE = [level for level in LEVELS if list(LEVELS).index(level) >= list(LEVELS).index(cpu_level())]


def case(
    batch=1, heads=2, groups=4, size=64, value_size=None, blocks=10, bits=(4, 4), queries=1,
    exact=40, share=0.01, rotated=True, rows=0, spread=1.0, dtype=torch.float32, seed=0,
):  # fmt: skip
    """Arguments of attend, with keys and values of a realistic scale; spread: of channel means."""
    value_size, length = value_size or size, 32 * blocks
    k = random(batch, heads, length, size, seed=seed) + spread * random(1, heads, 1, size, seed=9)
    v = random(batch, heads, length, value_size, seed=seed + 1)
    if blocks:
        key, value = (
            packed("key", k, bits[0], share, scale_by=0.7),
            packed("value", v, bits[1], share),
        )
    else:
        some = [random(batch, heads, 32, n) for n in (size, value_size)]
        key, value = packed("key", some[0], bits[0]), packed("value", some[1], bits[1])
    if rows:
        count = -(-length // rows)
        key.scale, key.zero = (
            (x * (1 + 0.2 * random(batch, heads, count, size, seed=n))).half()
            for n, x in enumerate((key.scale, key.zero))
        )
    angles = torch.arange(length)[None, :, None] * 10000.0 ** -(torch.arange(size // 2) * 2 / size)
    table = pack_table(angles.cos(), angles.sin(), "llvm") if rotated else None
    mask = torch.zeros(batch, queries, exact)
    if exact:
        mask[:, :, exact - queries :] = torch.full((queries, queries), -math.inf).triu(1)
    return [
        random(batch, heads * groups, queries, size, seed=2).to(dtype),
        Body(key, value, blocks, rows, table),
        random(batch, heads, exact, size, seed=3).to(dtype),
        random(batch, heads, exact, value_size, seed=4).to(dtype),
        mask,
        torch.zeros(batch, queries, dtype=torch.int32),
        torch.full((heads * groups,), -math.inf),
        size**-0.5,
    ]


def check(arguments, bound=BOUND, level=None):
    exact = reference.attend(arguments[0].double(), *arguments[1:], dtype=torch.float64)
    out = attend(*arguments, level=level)
    assert out.dtype == arguments[0].dtype
    error = (out.double() - exact).norm() / exact.norm().clamp(min=1e-9)
    assert error < bound, error


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("bits", [(4, 4), (3, 2), (2, 3)])
def test_equals_reference(level, bits):
    check(case(bits=bits), level=level)


@pytest.mark.slow
@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4)])
@pytest.mark.parametrize("rotated", [False, True])
def test_all_head_sizes_and_bits(level, size, bits, rotated):
    check(case(size=size, bits=bits, rotated=rotated), level=level)


@pytest.mark.slow
@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("queries", [1, 2, 5, 16])
def test_rows(level, groups, queries):
    check(case(groups=groups, queries=queries), level=level)


@pytest.mark.parametrize("level", HERE)
def test_batches_see_from_first_on(level):
    arguments = case(batch=2, queries=3, groups=3)
    arguments[5] = torch.tensor([[0, 40, 320], [5, 256, 300]], dtype=torch.int32)
    check(arguments, level=level)


@pytest.mark.parametrize("level", HERE)
def test_a_query_that_sees_nothing_gives_zeros(level):
    arguments = case(batch=2, exact=0)
    arguments[5] = torch.tensor([[320], [64]], dtype=torch.int32)
    check(arguments, level=level)
    assert not attend(*arguments, level=level)[0].any()


@pytest.mark.parametrize("level", HERE)
def test_sinks_and_groups_of_keys(level):
    arguments = case(batch=2, rows=64)
    arguments[6] = random(8) * 3
    check(arguments, level=level)


@pytest.mark.parametrize("change", [dict(blocks=0, share=0), dict(exact=0)], ids=str)
def test_one_part_alone(change):
    check(case(**change))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision(dtype):
    check(case(dtype=dtype), bound=BOUND + torch.finfo(dtype).eps)


def test_huge_zero_points_and_outliers():
    arguments = case(spread=20.0)
    outliers = arguments[1].value.outliers
    outliers[..., :3] = outliers[..., :3] & -0x10000 | 0x7000  # 8192
    check(arguments, bound=4e-3)


def test_room_beyond_the_body_is_not_read():
    arguments = case()
    body = arguments[1]
    expected = attend(*arguments)
    for part in (body.key, body.value):
        part.codes = torch.cat((part.codes, torch.full_like(part.codes, 255)), 2)
        part.outliers = torch.cat((part.outliers, torch.full_like(part.outliers, -1)), 1)
        part.offsets = torch.cat((part.offsets, torch.full_like(part.offsets, 1 << 30)), 1)
    body.value.scale = torch.cat((body.value.scale, body.value.scale * math.nan), 1)
    assert torch.equal(attend(*arguments), expected)


def test_misaligned_and_strided_tensors():
    arguments = case()
    expected = attend(*arguments)

    def moved(x):
        room = torch.empty(x.numel() + 1, dtype=x.dtype)
        return room[1:].view(x.shape).copy_(x)

    body = arguments[1]
    for part in (body.key, body.value):
        for name in ("codes", "scale", "zero", "outliers", "offsets"):
            setattr(part, name, moved(getattr(part, name)))
    body.table = moved(body.table)
    arguments[0] = moved(arguments[0])
    for i in (2, 3):
        room = torch.full((1, 2, 77, 64), math.nan)
        room[:, :, :40] = arguments[i]
        arguments[i] = room[:, :, :40]
    assert torch.equal(attend(*arguments), expected)


def test_threads_change_nothing_but_rounding():
    arguments, before = case(blocks=70), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            check(arguments)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("change", [dict(size=48), dict(bits=(8, 4))], ids=str)
def test_shapes_without_a_kernel(change):
    with pytest.raises(KernelError, match="no CPU kernel"):
        attend(*case(**change))
    with pytest.raises(KernelError, match="soft cap"):
        attend(*case(), softcap=30.0)


def test_error_is_seen():
    """The check fails when one block's scale is off by a tenth."""
    arguments = case()
    body = arguments[1]
    exact = reference.attend(arguments[0].double(), *arguments[1:], dtype=torch.float64)
    body.value.scale[:, 3] *= 1.1
    assert (attend(*arguments).double() - exact).norm() / exact.norm() > BOUND
