import os
import shutil
import subprocess
import sys

import pytest
import torch

from regraft.kernels import compiled
from regraft.kernels.compiled import KernelError, files_in_use, kernel

pytest.importorskip("tvm_ffi")
LLVM = compiled.LEVELS["portable"]
RUN = """
import sys
sys.modules["tvm"] = None
from pathlib import Path
import torch
import sklearn.linear_model  # maps an OpenMP library of its own
from regraft.kernels import compiled
from tests.kernels.test_compiled import LLVM, never
compiled.search_path.append(Path({folder!r}))
x, out = torch.arange(8.0), torch.empty(8)
compiled.kernel("double", never, LLVM, "test")(x, out)
assert torch.equal(out, 2 * x), out
"""


def double():
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("double")
            size = T.int32()
            x = T.match_buffer(T.arg("x", T.handle()), (size,), "float32", align=4)
            out = T.match_buffer(T.arg("out", T.handle()), (size,), "float32", align=4)
            with T.parallel(0, size) as i:
                T.buffer_store(out, x[i] * T.float32(2), [i])
    return builder.get().with_attr("global_symbol", "double")


def never():
    raise AssertionError("compiled again")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing loaded, nothing in the cache."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "_loaded", {})
    monkeypatch.setattr(compiled, "_failed", {})
    monkeypatch.setattr(compiled, "_files", {})
    compiled._launcher.cache_clear()
    yield tmp_path
    compiled._launcher.cache_clear()


def run(function):
    x, out = torch.arange(8.0), torch.empty(8)
    function(x, out)
    assert torch.equal(out, 2 * x)


def test_kernel_runs_and_is_kept(fresh, monkeypatch):
    run(kernel("double", double, LLVM, "test"))
    assert kernel("double", never, LLVM, "test") is kernel("double", never, LLVM, "test")
    monkeypatch.setattr(compiled, "_loaded", {})
    run(kernel("double", never, LLVM, "test"))


def test_kernel_loads_without_tvm_from_a_moved_folder(fresh):
    kernel("double", double, LLVM, "test")
    moved = fresh / "moved"
    moved.mkdir()
    for file in files_in_use():
        shutil.copy(file, moved / file.name)
    assert len(list(moved.iterdir())) == 2
    code = RUN.format(folder=str(moved))
    environment = {
        **os.environ,
        "REGRAFT_CACHE": str(fresh / "empty"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert not (fresh / "empty").exists()


def test_damaged_files_are_made_anew(fresh, monkeypatch):
    kernel("double", double, LLVM, "test")
    for file in files_in_use():
        file.unlink()  # the loaded library is mapped to the old file
        file.write_bytes(b"\x7fELF and nothing more")
    monkeypatch.setattr(compiled, "_loaded", {})
    compiled._launcher.cache_clear()
    run(kernel("double", double, LLVM, "test"))


def test_without_compiler_there_is_one_clear_error(fresh, monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(KernelError, match="no C compiler"):
        kernel("double", double, LLVM, "test")


def test_without_tvm_there_is_one_clear_error(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(KernelError, match="needs apache-tvm"):
        kernel("double", double, LLVM, "test")


def test_bad_kernel_leaves_no_file(fresh):
    def bad():
        raise ValueError("no such kernel")

    with pytest.raises(KernelError, match="double does not compile: no such kernel"):
        kernel("double", bad, LLVM, "test")
    assert not [path for path in fresh.rglob("*") if path.is_file()]


def test_one_pool_of_threads(fresh):
    """Torch's loops after the kernel's need no further threads."""
    function = kernel("double", double, LLVM, "test")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        run(function)
        many = len(os.listdir("/proc/self/task"))
        torch.ones(1 << 22).mul_(2)
        assert len(os.listdir("/proc/self/task")) == many
    finally:
        torch.set_num_threads(before)


def test_what_failed_is_not_tried_again(fresh):
    made = []

    def broken():
        made.append(1)
        raise ValueError("no such kernel")

    for _ in range(2):
        with pytest.raises(KernelError, match="double does not compile: no such kernel"):
            kernel("double", broken, LLVM, "broken")
    assert len(made) == 1
