"""The kernel that rotates a token and writes it to the cache."""

import pytest
import torch

from regraft.kernels.rotary.llvm import fits, write
from regraft.kernels.rotary.reference import rotate
from regraft.runtime.buffer import RotationTable
from regraft.runtime.cache import DenseLayer

pytest.importorskip("tvm")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("REGRAFT_TVM", "1")


def table(length, pairs):
    angle = torch.outer(torch.arange(length).float(), torch.logspace(0, -3, pairs))[None]
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "size, pairs, offset", [(64, 32, 0), (64, 16, 0), (96, 16, 64), (80, 8, 24)]
)
def test_equals_the_reference(interleaved, size, pairs, offset):
    fused = torch.randn(1, 1, 9 * size + 3 * size + 3 * 48)
    q, k, v = fused.split([9 * size, 3 * size, 3 * 48], -1)
    q, k, v = (x.view(1, 1, n, -1).transpose(1, 2) for x, n in ((q, 9), (k, 3), (v, 3)))
    cos, sin = (x[:, 7:8] for x in table(8, pairs))
    key, value = torch.zeros(1, 3, 10, size), torch.zeros(1, 3, 10, 48)
    assert fits(q, k, v, cos, key, offset)
    found = write(q, k, v, cos, sin, key, value, 4, interleaved, offset)
    wanted = [rotate(x.double(), cos, sin, interleaved, offset) for x in (q, k)]
    assert (found - wanted[0]).abs().max() < 1e-6
    assert (key[:, :, 4:5] - wanted[1]).abs().max() < 1e-6
    assert torch.equal(value[:, :, 4:5], v)
    assert not key[:, :, :4].any() and not key[:, :, 5:].any() and not value[:, :, 5:].any()


def test_what_it_does_not_take():
    one = torch.randn(1, 4, 1, 64)
    cos = torch.ones(1, 1, 32)
    assert fits(one, one, one, cos, one)
    assert not fits(one, one, one, cos, None)
    assert not fits(one.expand(2, -1, -1, -1), one, one, cos, one)
    assert not fits(one.expand(-1, -1, 2, -1), one, one, cos, one)
    assert not fits(one.bfloat16(), one, one, cos, one)
    assert not fits(one, one, one, torch.ones(1, 1, 40), one)
    assert not fits(one, one, one, cos, one, offset=1)


def test_a_layer_decodes_as_by_reference_and_grows(monkeypatch):
    outs = []
    for wanted in ("1", "0"):
        monkeypatch.setenv("REGRAFT_TVM", wanted)
        layer, rows = DenseLayer(), RotationTable()
        cos, sin = table(600, 32)
        generator = torch.Generator().manual_seed(0)
        start, made = 0, []
        for count in (250, *[1] * 12, 3, 1):
            q, k, v = (torch.randn(1, n, count, 64, generator=generator) for n in (9, 3, 3))
            rows.append(cos[:, start : start + count], sin[:, start : start + count])
            made.append(layer.step(q, k, v, rows))
            start += count
            assert layer.length == start
        outs.append((torch.cat(made, 2), layer.key, layer.value))
    for ours, plain in zip(*outs, strict=True):
        assert (ours - plain).abs().max() < 1e-5
