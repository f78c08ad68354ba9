import pytest
import torch

from regraft.kernels import compiled, ops  # noqa: F401
from regraft.kernels.linear import llvm, packed
from regraft.kernels.linear.formats import dequantize
from regraft.program import RegraftError
from tests.kernels.linear.packed import random_packed

FORMAT, ROWS, COLUMNS = "int4g32z", 70, 128
run = torch.ops.regraft.packed_linear
look_up = torch.ops.regraft.packed_embedding


@pytest.fixture(params=["kernels", "reference"])
def both(request, monkeypatch):
    if request.param == "kernels":
        pytest.importorskip("tvm")
        monkeypatch.setenv("REGRAFT_TVM", "1")


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 3), (5, 9), (40,), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_of_any_shape(both, shape, dtype):
    weights, bias = random_packed(FORMAT, ROWS, COLUMNS), torch.randn(ROWS).to(dtype)
    x = torch.randn(*shape, COLUMNS).to(dtype)
    out = run(x, weights, bias, FORMAT, ROWS)
    wanted = x.double() @ dequantize(weights, FORMAT, ROWS, COLUMNS).double().t() + bias
    assert out.dtype == dtype and out.shape == wanted.shape
    bound = 1e-4 if dtype == torch.float32 else 8e-3
    assert (out - wanted).norm() <= bound * wanted.norm()


def test_large_vocabularies_by_tiles(both):
    rows = packed.TILES * 16 * 2 + 7
    weights, x = random_packed("int8g32", rows, 64), torch.randn(20, 64)
    wanted = x @ dequantize(weights, "int8g32", rows, 64).t()
    torch.testing.assert_close(run(x, weights, None, "int8g32", rows), wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("format", ["float16", "bfloat16"])
def test_halves(both, format):
    weights = torch.randn(ROWS, COLUMNS).to(getattr(torch, format))
    for count in (1, 20):
        x = torch.randn(count, COLUMNS)
        out = run(x, weights, None, format, ROWS)
        torch.testing.assert_close(out, x @ weights.float().t(), rtol=1e-4, atol=1e-3)
    ids = torch.tensor([[3, 0]])
    assert torch.equal(look_up(ids, weights, format, ROWS, COLUMNS), weights[ids].float())


@pytest.mark.parametrize("format", ["int8", "int4g32z", "int8g32"])
def test_embedding(format):
    weights = random_packed(format, ROWS, COLUMNS)
    ids = torch.randint(0, ROWS, (3, 13))
    wanted = dequantize(weights, format, ROWS, COLUMNS)[ids]
    assert torch.equal(look_up(ids, weights, format, ROWS, COLUMNS), wanted)


@pytest.mark.parametrize("bad", [-1, ROWS])
def test_ids_outside_the_table(bad):
    weights = random_packed(FORMAT, ROWS, COLUMNS)
    with pytest.raises(RegraftError, match="outside the 70 rows"):
        look_up(torch.tensor([0, bad]), weights, FORMAT, ROWS, COLUMNS)


@pytest.mark.parametrize(
    "change",
    [
        dict(rows=ROWS + 16),
        dict(format="int8g32"),
        dict(packed=torch.zeros(5, 4)),
        dict(x=torch.zeros(1, COLUMNS + 32)),
        dict(x=torch.zeros(1, COLUMNS + 1)),
        dict(bias=torch.zeros(3)),
        dict(format="float16"),
    ],
    ids=str,
)
def test_weights_of_another_size_are_never_read(both, change):
    given = dict(x=torch.zeros(1, COLUMNS), packed=random_packed(FORMAT, ROWS, COLUMNS), bias=None,
                 format=FORMAT, rows=ROWS) | change  # fmt: skip
    with pytest.raises(RegraftError):
        run(*given.values())


def test_one_notice_where_no_kernel_can_be_made(monkeypatch, notices):
    def fail(*_):
        raise compiled.KernelError("no compiler here, this time")

    monkeypatch.setenv("REGRAFT_TVM", "1")
    monkeypatch.setattr(llvm, "linear", fail)
    monkeypatch.setattr(llvm, "unpacked", fail)
    weights, x = random_packed(FORMAT, ROWS, COLUMNS), torch.randn(2, COLUMNS)
    for _ in range(2):
        out = run(x, weights, None, FORMAT, ROWS)
        torch.testing.assert_close(out, x @ dequantize(weights, FORMAT, ROWS, COLUMNS).t())
    assert len(notices) == 1 and "packed linear layers run by reference" in notices[0]
