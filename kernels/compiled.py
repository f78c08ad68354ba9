"""Kernels that TVM compiles at first use and that later processes load without TVM.

A kernel is one shared library, found by what it was made from: in the folders of ``search_path``
(those of loaded artefacts), then in the user's cache. Its last 32 bytes are the SHA-256 of the
rest. Loading takes tvm_ffi alone; parallel loops run on the OpenMP pool that torch has started,
by a launcher that the system's C compiler makes once.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from regraft.program import RegraftError
from regraft.program.folders import cache_dir, written_whole

Target = Mapping[str, Any]
LAUNCHER = Path(__file__).with_name("omp_launch.c")
LEVELS: dict[str, Target] = {
    "avx512": {"kind": "llvm", "mcpu": "icelake-server", "mattr": ("+fast-dpwssd",)},
    "avx2": {"kind": "llvm", "mcpu": "x86-64-v3"},
    "portable": {"kind": "llvm"},
}
"""What kernels for processors are generated for, the best first. avx512 includes VNNI, whose
multiply-add LLVM would split in two instructions without fast-dpwssd."""

search_path: list[Path] = []
"""Folders that are looked in before the cache, first to last."""

log = logging.getLogger("regraft")
_loaded: dict[str, Callable[..., None]] = {}
_failed: dict[str, str] = {}
_told: set[str] = set()
_files: dict[str, Path] = {}
_entries: dict[int, int | None] = {}
_kept: list[Any] = []


class KernelError(RegraftError):
    """A kernel cannot be made or loaded here; the operator's reference can take its place."""


@cache
def cpu_level() -> str:
    """The best of LEVELS that this processor has."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and torch.cpu._is_vnni_supported():
        return "avx512"
    return "avx2" if capability in ("AVX2", "AVX512") else "portable"


def kernel(
    name: str, make: Callable[[], Any], target: Target, key: Any = (), overlapping: bool = False
) -> Callable[..., None]:
    """The compiled function ``name`` of the PrimFunc or IRModule that ``make()`` returns.

    ``target`` is TVM's, as a dictionary; ``key`` tells apart what else ``make`` depends on, by its
    repr. overlapping: see ``overlap.py``. ``make`` is called, and TVM imported, only where no file
    of an earlier call is found.
    Raises KernelError, and again at each later call without another try.
    """
    identity = hashlib.sha256(repr((name, key, dict(target), _source())).encode()).hexdigest()[:24]
    if identity in _failed:
        raise KernelError(_failed[identity])
    if identity not in _loaded:

        def compile_(path: Path) -> None:
            _compile(path, name, make, target, overlapping)

        try:
            _prepare(target)
            file = _find(f"{name}-{identity}.so", compile_)
            _loaded[identity] = _load(file, name)
        except KernelError as error:
            _failed[identity] = str(error)
            raise
        except (OSError, RuntimeError, ImportError, AttributeError) as error:
            _failed[identity] = f"kernel {name} cannot be loaded: {_line(error)}"
            raise KernelError(_failed[identity]) from error
        _files[identity] = file
    return _loaded[identity]


def entry(function: Callable[..., None]) -> int | None:
    """The address of a kernel's code, which takes arguments as TVM passes them."""
    return _entries.get(id(function))


def wanted() -> bool:
    """Whether operators use kernels; REGRAFT_TVM=0 says no."""
    return os.environ.get("REGRAFT_TVM") != "0"


def tell(consequence: str, error: KernelError) -> None:
    """Log once a message that something runs without its kernel."""
    if str(error) not in _told:
        _told.add(str(error))
        log.warning("regraft: %s: %s", consequence, error)


def files_in_use() -> list[Path]:
    """The files behind the kernels loaded so far, launcher included: what an artefact takes."""
    return sorted(set(_files.values()))


def _find(file: str, make: Callable[[Path], None]) -> Path:
    """The whole file of this name, made in the cache where it is nowhere."""
    cached = cache_dir() / "kernels" / _tvm_version() / file
    for path in [*(folder / file for folder in search_path), cached]:
        if path.is_file() and _is_whole(path):
            return path
    try:
        with written_whole(cached) as partial:
            make(partial)
            data = partial.read_bytes()
            partial.write_bytes(data + hashlib.sha256(data).digest())
            partial.chmod(0o755)
    except OSError as error:
        raise KernelError(f"kernels cannot be kept in {cached.parent}: {error}") from error
    return cached


def _is_whole(path: Path) -> bool:
    data = path.read_bytes()
    return hashlib.sha256(data[:-32]).digest() == data[-32:]


def _compile(
    path: Path, name: str, make: Callable[[], Any], target: Target, overlapping: bool
) -> None:
    compiler = _compiler()
    if shutil.which("nvcc"):
        os.environ.setdefault("TVM_CUDA_COMPILE_MODE", "nvcc")
    try:
        import tvm

        made = make()
        module = made if isinstance(made, tvm.IRModule) else tvm.IRModule({name: made})
        config = {"tirx.disable_storage_rewrite": target["kind"] == "llvm"}
        with tvm.transform.PassContext(opt_level=3, config=config), tvm.target.Target(target):
            pipeline = "s_tir" if target["kind"] == "llvm" else "tirx"
            if overlapping:
                from regraft.kernels import overlap

                pipeline = overlap.NAME
            compiled = tvm.compile(module, tvm.target.Target(target), tir_pipeline=pipeline)
        compiled.export_library(str(path), cc=compiler)
    except ImportError as error:
        raise KernelError(f"kernel {name} needs apache-tvm to compile: {_line(error)}") from error
    except Exception as error:
        raise KernelError(f"kernel {name} does not compile: {_line(error)}") from error


def _load(file: Path, name: str) -> Callable[..., None]:
    import tvm_ffi

    module = tvm_ffi.load_module(str(file))
    library = ctypes.CDLL(str(file))
    function = module[name]
    _kept.append((module, library, function))
    if hasattr(library, "__TVMBackendParallelLaunch"):
        pointer = ctypes.c_void_p.in_dll(library, "__TVMBackendParallelLaunch")
        pointer.value = _launcher()
    if code := getattr(library, f"__tvm_ffi_{name}", None):
        _entries[id(function)] = ctypes.cast(code, ctypes.c_void_p).value
    return function


@cache
def _launcher() -> int | None:
    """The address of omp_launch, linked against the OpenMP library of this process."""
    return ctypes.cast(native(LAUNCHER, _openmp()).omp_launch, ctypes.c_void_p).value


def native(source: Path, linked: Path) -> ctypes.CDLL:
    """The library of a C or C++ file linked to another library, compiled once.

    Raises KernelError and OSError.
    """
    identity = hashlib.sha256(source.read_bytes() + linked.name.encode()).hexdigest()[:24]

    def make(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder, "built.so")
            command = [_compiler(), "-O2", "-shared", "-fPIC", str(source), str(linked)]
            command += ["-lstdc++"] if source.suffix == ".cpp" else []
            result = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
            if result.returncode:
                raise KernelError(f"{source.name} does not compile: {result.stderr[:200]}")
            path.write_bytes(built.read_bytes())

    file = _find(f"{source.stem}-{identity}.so", make)
    _files[identity] = file
    _kept.append(library := ctypes.CDLL(str(file)))
    return library


def _openmp() -> Path:
    """torch's own OpenMP library among the mapped ones (scikit-learn and others bring another)."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text() if maps.is_file() else ""
    found = [Path(name) for name in re.findall(r"/\S*lib(?:gomp|iomp5|omp)\b\S*\.so\S*", lines)]
    if not found:
        raise KernelError("torch runs without an OpenMP library that kernels could share")
    home = Path(torch.__file__).parent
    return next((path for path in found if path.is_relative_to(home)), found[0])


def _prepare(target: Target) -> None:
    """Load what kernels of a device need besides tvm_ffi."""
    if target["kind"] != "llvm":
        _load_runtime(str(target["kind"]))


@cache
def _load_runtime(kind: str) -> None:
    import tvm_ffi  # noqa: F401  what the libraries link to

    found = importlib.util.find_spec("tvm")
    if found is None or found.origin is None:
        raise KernelError(f"kernels for {kind} need the libraries of apache-tvm")
    for name in ("libtvm_runtime.so", f"libtvm_runtime_{kind}.so"):
        try:
            _kept.append(ctypes.CDLL(str(Path(found.origin).parent / "lib" / name), os.RTLD_GLOBAL))
        except OSError as error:
            raise KernelError(f"{name} cannot be loaded: {_line(error)}") from error


@cache
def _tvm_version() -> str:
    try:
        return importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            return path
    raise KernelError("no C compiler was found; install gcc or name one in CC")


@cache
def _source() -> str:
    """The hash of the modules of this folder that generate kernels."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        if file.name == "onnx.py":
            continue
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
