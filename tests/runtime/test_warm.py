"""A model whose quantized caches run TVM kernels, from compiling it to loading it elsewhere."""

import os
import subprocess
import sys

import pytest
import torch

import regraft
from regraft.kernels import compiled
from tests.conftest import tiny

if compiled.cpu_level() == "portable":
    pytest.skip("takes long without vector units", allow_module_level=True)


@pytest.fixture(scope="module")
def model():
    return tiny("llama", head_dim=64, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setenv("REGRAFT_TVM", "1")


def decode(fast, count=3):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 256, (1, 140 + count), generator=generator)
    cache = fast.new_cache()
    fast(ids[:, :140], past_key_values=cache)
    steps = [fast(ids[:, i : i + 1], past_key_values=cache).logits for i in range(140, 140 + count)]
    assert all(layer.blocks == 2 for layer in cache.state.layers)
    return torch.cat(steps, 1)


def test_kernels_follow_the_reference(model, kernels, notices, monkeypatch):
    fast = regraft.compile(model, [regraft.KVQuant(bits=4)])
    assert any(file.name.startswith("attend-") for file in compiled.files_in_use())
    with_kernels = decode(fast)
    monkeypatch.setenv("REGRAFT_TVM", "0")
    reference = decode(fast)
    assert (with_kernels - reference).norm() <= 2e-3 * reference.norm()
    assert not torch.equal(with_kernels, reference)
    assert not notices


def test_the_reference_target_runs_no_kernel(model, kernels, monkeypatch):
    plain = regraft.compile(model, [regraft.KVQuant(bits=4)], target="reference")
    monkeypatch.setattr("regraft.kernels.kvquant.dispatch.kernels_of", None)
    decode(plain)


def test_head_sizes_without_a_kernel_get_one_notice(kernels, notices):
    small = tiny("llama", head_dim=48, num_attention_heads=4, num_key_value_heads=2)
    fast = regraft.compile(small, [regraft.KVQuant(bits=4)])
    ids = torch.randint(3, 256, (1, 150))
    cache = fast.new_cache()
    fast(ids[:, :140], past_key_values=cache)
    fast(ids[:, 140:141], past_key_values=cache)
    fast(ids[:, 141:142], past_key_values=cache)
    assert sum("48" in message and "reference" in message for message in notices) == 1


def test_an_artefact_takes_its_kernels_along(model, kernels, tmp_path):
    """Loaded by a process with an empty cache that cannot import tvm."""
    fast = regraft.compile(model, [regraft.KVQuant(bits=4)])
    fast.save(tmp_path / "model")
    expected = decode(fast)
    torch.save(expected, tmp_path / "expected.pt")
    code = f"""
import sys
sys.modules["tvm"] = None
import torch, regraft
from tests.runtime.test_warm import compiled, decode, os
os.environ["REGRAFT_TVM"] = "1"
fast = regraft.load({str(tmp_path / "model")!r})
assert torch.equal(decode(fast), torch.load({str(tmp_path / "expected.pt")!r}))
assert {{file.parent.parent.name for file in compiled.files_in_use()}} == {{"model"}}
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env={**os.environ, "REGRAFT_CACHE": str(tmp_path / "empty"),
             "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "reference" not in done.stderr
