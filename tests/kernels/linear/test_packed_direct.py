"""Packed linear layers that C++ calls by itself."""

import threading

import pytest
import torch

from regraft.kernels import ops  # noqa: F401
from regraft.kernels.linear import packed as by_python
from regraft.kernels.linear.llvm import direct
from tests.kernels.linear.packed import FORMATS, random_packed

pytest.importorskip("tvm")
checked, straight = torch.ops.regraft.packed_linear, torch.ops.regraft.packed_direct


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("REGRAFT_TVM", "1")
    if direct._library() is None:
        pytest.skip("no C++ compiler")


def both(x, *arguments, straight_on=True):
    """The same to the bit, and from C++ after the first of its shape."""
    checked(x, *arguments)
    before = direct.served()
    found = straight(x, *arguments)
    assert direct.served() == before + straight_on
    wanted = checked(x, *arguments)
    assert found.shape == wanted.shape and found.stride() == wanted.stride()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("format", FORMATS)
def test_equals_python(format):
    packed = random_packed(format, 100, 512)
    for count in (1, 2, 5):
        both(torch.randn(count, 512), packed, None, format, 100)


def test_bias_and_leading_dimensions():
    packed, bias = random_packed("int4g32z", 48, 256), torch.randn(48)
    for shape in ((256,), (1, 256), (1, 3, 256), (2, 1, 4, 256)):
        both(torch.randn(shape), packed, bias, "int4g32z", 48)


def test_activations_that_are_not_as_they_were_go_to_python():
    packed = random_packed("int8g32", 32, 64)
    rows = torch.randn(4, 130)
    both(rows[:, :64], packed, None, "int8g32", 32, straight_on=False)
    both(torch.randn(1, 65)[:, 1:], packed, None, "int8g32", 32, straight_on=False)
    both(torch.randn(1, 64).bfloat16(), packed, None, "int8g32", 32, straight_on=False)
    both(torch.randn(20, 64), packed, None, "int8g32", 32, straight_on=False)
    both(torch.randn(0, 64), packed, None, "int8g32", 32, straight_on=False)


def test_columns_that_are_filled_up_go_to_python():
    packed = random_packed("int8", 20, 33)
    both(torch.randn(1, 33), packed, None, "int8", 20, straight_on=False)


def test_other_weights_are_refused():
    packed = random_packed("int4g32z", 48, 256)
    both(torch.randn(1, 256), packed, None, "int4g32z", 48)
    with pytest.raises(RuntimeError):
        straight(torch.randn(1, 256), packed[:2], None, "int4g32z", 48)
    with pytest.raises(RuntimeError):
        straight(torch.randn(1, 256), packed, torch.randn(47), "int4g32z", 48)


def test_python_is_asked_where_kernels_are_not_wanted(monkeypatch):
    packed, x = random_packed("int4g32z", 48, 256), torch.randn(1, 256)
    both(x, packed, None, "int4g32z", 48)
    with by_python.unrounded():
        both(x, packed, None, "int4g32z", 48, straight_on=False)
    both(x, packed, None, "int4g32z", 48)
    monkeypatch.setenv("REGRAFT_TVM", "0")
    both(x, packed, None, "int4g32z", 48, straight_on=False)


def test_threads():
    packed = random_packed("int4g32z", 160, 256)
    inputs = [torch.randn(n, 256) for n in (1, 2, 3, 4)]
    wanted = [checked(x, packed, None, "int4g32z", 160) for x in inputs]
    failed = []

    def work(n):
        for _ in range(200):
            if not torch.equal(straight(inputs[n], packed, None, "int4g32z", 160), wanted[n]):
                failed.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
