import math

import pytest
import torch

from regraft.kernels.attention.llvm import attend
from regraft.kernels.compiled import LEVELS, KernelError, cpu_level
from tests.kernels.test_kvquant import random

pytest.importorskip("tvm")
HERE = [level for level in LEVELS if list(LEVELS).index(level) >= list(LEVELS).index(cpu_level())]


def case(batch=1, heads=2, groups=4, queries=1, length=300, size=64, value_size=None,
         dtype=torch.float32):  # fmt: skip
    value_size = value_size or size
    return [
        random(batch, heads * groups, queries, size).to(dtype),
        random(batch, heads, length, size, seed=1).to(dtype),
        random(batch, heads, length, value_size, seed=2).to(dtype),
        torch.zeros(batch, queries, dtype=torch.int32),
        torch.full((heads * groups,), -math.inf),
        size**-0.5,
    ]


def expected(q, key, value, first, sinks, scale):
    """float64 softmax over what each query sees and the sinks."""
    groups, length, queries = q.shape[1] // key.shape[1], key.shape[2], q.shape[2]
    key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    position = torch.arange(length)
    seen = (position >= first.unsqueeze(-1)) & (
        position <= torch.arange(length - queries, length).unsqueeze(-1)
    )
    scores = (q.double() @ key.mT * scale).masked_fill(~seen.unsqueeze(1), -math.inf)
    column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch._safe_softmax(torch.cat((scores, column), -1), -1)[..., :-1] @ value


def check(arguments, bound=2e-6, level=None):
    exact, out = expected(*arguments), attend(*arguments, level=level)
    assert out.dtype == arguments[0].dtype
    assert (out.double() - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize(
    "change",
    [
        dict(),
        dict(length=1),
        dict(length=512, queries=16, groups=3),
        dict(batch=2, heads=3, groups=3, queries=2, length=777, size=80, value_size=96),
        dict(size=256, groups=1, length=513),
    ],
    ids=str,
)
def test_equals_attention(level, change):
    check(case(**change), level=level)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(case(dtype=dtype, queries=3), bound=torch.finfo(dtype).eps)


def test_padding_windows_and_sinks():
    arguments = case(batch=2, queries=2, length=700)
    arguments[3] = torch.tensor([[3, 300], [698, 700]], dtype=torch.int32)
    arguments[4][1:] = 2 * random(7)
    check(arguments)
    assert not attend(*arguments)[1, 0, 1].any()


def test_strided_and_misaligned_caches():
    arguments = case()
    before = attend(*arguments)
    for i in (1, 2):
        room = torch.full((1 * 2 * 400 * 64 + 1,), math.nan)[1:].view(1, 2, 400, 64)
        room[:, :, 50:350] = arguments[i]
        arguments[i] = room[:, :, 50:350]
    assert torch.equal(attend(*arguments), before)


def test_threads_share_the_tokens():
    arguments, before = case(heads=1, length=2000), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check(arguments)
    finally:
        torch.set_num_threads(before)


def test_head_sizes_without_a_kernel():
    with pytest.raises(KernelError, match="no CPU kernel"):
        attend(*case(size=72))
