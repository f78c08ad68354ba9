import pytest
import torch

from regraft.kernels.attention import dispatch
from regraft.kernels.attention.cuda import attend, fits
from regraft.kernels.attention.reference import attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def draw(
    batch=2, groups=4, heads=3, queries=1, size=64, value_size=None, length=300, room=40,
    dtype=torch.bfloat16,
):  # fmt: skip
    """q, and k and v at the start of larger buffers."""

    def normal(heads, length, size):
        return torch.randn(batch, heads, length, size, device="cuda", dtype=dtype)

    k, v = (normal(heads, length + room, n)[:, :, :length] for n in (size, value_size or size))
    return normal(groups * heads, queries, size), k, v


def check(out, q, k, v, *settings):
    want = attention(q.double(), k.double(), v.double(), *settings)
    assert out.dtype == q.dtype
    assert (out - want).norm() < (4e-3 if q.dtype == torch.bfloat16 else 6e-4) * want.norm()


@pytest.mark.parametrize("window", [0, 1, 70])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"length": 1, "room": 0},
        {"length": 3000, "dtype": torch.float16},
        {"queries": 5},
        {"groups": 1, "queries": 16, "length": 16},
        {"groups": 8, "queries": 8, "size": 128, "heads": 1},
        {"size": 80, "value_size": 96, "groups": 3, "queries": 2},
        {"size": 256, "batch": 1, "queries": 3},
    ],
    ids=str,
)
def test_equals_attention(case, window):
    q, k, v = draw(**case)
    out = attend(q, k, v, k.shape[2], window=window)
    check(out, q, k, v, None, None, 0.0, None, True, window)


@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_masks_soft_caps_and_sinks(softcap):
    q, k, v = draw(queries=3, length=500)
    mask = torch.rand(2, 1, 3, 500, device="cuda") < 0.5
    mask[1, :, :, 32:320] = False
    sinks = torch.randn(12, device="cuda")
    for some in (mask, mask[:1]):
        out = attend(q, k, v, 500, mask=some, sinks=sinks, scale=0.2, softcap=softcap)
        check(out, q, k, v, some, 0.2, softcap, sinks, False)


def test_what_no_query_sees_is_nothing():
    q, k, v = draw(length=64)
    mask = torch.zeros(2, 1, 1, 64, dtype=torch.bool, device="cuda")
    assert not attend(q, k, v, 64, mask=mask).any()


def test_a_position_on_the_device_ends_the_buffers():
    q, k, v = draw(length=200, room=0)
    k[:, :, 121:] = v[:, :, 121:] = float("nan")
    position = torch.tensor([120], device="cuda")
    graph = torch.cuda.CUDAGraph()
    attend(q, k, v, 1, position)
    with torch.cuda.graph(graph):
        out = attend(q, k, v, 1, position)
    for at in (120, 40, 0):
        position.fill_(at)
        graph.replay()
        check(out, q, k[:, :, : at + 1], v[:, :, : at + 1])


def test_refuses_what_it_has_no_kernel_for():
    q, k, v = draw()
    assert fits(q, k, v)
    assert not fits(q.float(), k.float(), v.float())
    assert not fits(q, k.transpose(1, 2).contiguous().transpose(1, 2), v)
    assert not fits(q.expand(-1, -1, 100, -1), k, v)
    assert not fits(q, k, v, torch.zeros(2, 1, 1, 300, device="cuda"))


def test_what_has_no_kernel_runs_by_reference():
    q, k, v = draw(dtype=torch.float32)
    torch.testing.assert_close(dispatch.attend(q, k, v), attention(q, k, v))
