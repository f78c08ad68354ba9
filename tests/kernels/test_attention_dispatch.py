import pytest
import torch

from regraft.kernels.attention import llvm
from regraft.kernels.attention.dispatch import attend
from regraft.kernels.attention.reference import attention
from regraft.kernels.ops import causal_mask

pytest.importorskip("tvm")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("REGRAFT_TVM", "1")


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel ran."""
    made, own = [], llvm.attend
    monkeypatch.setattr(llvm, "attend", lambda *a: made.append(1) or own(*a))
    return made


def draw(queries=1, length=70, batch=2, dtype=torch.float32):
    q = torch.randn(batch, 6, queries, 32).to(dtype)
    k, v = torch.randn(2, batch, 2, length + 9, 32).to(dtype)[:, :, :, :length]
    return q, k, v


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("padded", [False, True])
def test_kernel_and_reference_see_alike(calls, queries, window, padded):
    q, k, v = draw(queries)
    mask, sinks = None, torch.randn(6)
    if padded:
        padding = torch.ones(2, 70, dtype=torch.long)
        padding[0, :13] = 0
        mask = causal_mask(padding, queries, 70, 70 - queries, window, 2)
    settings = (mask, 0.2, 0.0, sinks, True, window)
    torch.testing.assert_close(attend(q, k, v, *settings), attention(q, k, v, *settings))
    assert calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(calls, dtype):
    q, k, v = draw(3, dtype=dtype)
    want = attention(q.double(), k.double(), v.double())
    assert (attend(q, k, v) - want).norm() < 5e-3 * want.norm()
    assert calls


def test_what_no_kernel_says_runs_by_reference(calls):
    q, k, v = draw(3)
    holes = torch.rand(2, 1, 3, 70) < 0.5
    holes[..., 0] = True
    additive = torch.randn(2, 1, 3, 70)
    for settings in ((holes,), (additive,), (None, None, 3.0), (None, None, 0.0, None, False)):
        torch.testing.assert_close(attend(q, k, v, *settings), attention(q, k, v, *settings))
    attend(*draw(17))
    attend(q, k, v, kernels=False)
    assert not calls
