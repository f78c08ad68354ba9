"""The C++ part, compiled once for these sources and this torch and kept in the cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from regraft.program.folders import cache_dir, written_whole

HERE = Path(__file__).resolve().parent
SECONDS = 900

log = logging.getLogger("regraft")


@cache
def extension() -> Any:
    """The module, or None where it cannot be made: programs then run as they are, told once."""
    try:
        return _load(built())
    except (OSError, ImportError, RuntimeError, subprocess.SubprocessError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = (lines or [type(error).__name__])[-1][:300]
        log.warning("regraft: co-execution is off, programs run as they are: %s", reason)
        return None


def built() -> Path:
    """Its file. Raises OSError, RuntimeError and SubprocessError."""
    sources = sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")])
    parts = [torch.__version__, sysconfig.get_config_var("SOABI") or "", *_flags()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sources:
        digest.update(source.name.encode() + source.read_bytes())
    name = f"regraft_coexec_{digest.hexdigest()[:24]}"
    file = cache_dir() / "coexec" / f"{name}.so"
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.is_file():
            with written_whole(file) as partial:
                _compile(name, partial)
    return file


def _compile(name: str, path: Path) -> None:
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c), None)
    found = shutil.which(compiler) if compiler else None
    if found is None:
        raise RuntimeError("no C++ compiler was found; install g++ or name one in CXX")
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [*include_paths(), sysconfig.get_paths()["include"]]
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "built.so")
        command = [found, str(HERE / "module.cpp"), *_flags(), f"-DTORCH_EXTENSION_NAME={name}"]
        command += [item for include in includes for item in ("-isystem", include)]
        command += [item for place in library_paths() for item in ("-L", place)]
        command += ["-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if "error" in line]
            raise RuntimeError("; ".join(lines[:1]) or result.stderr[:300])
        path.write_bytes(built.read_bytes())
        path.chmod(0o755)


def _flags() -> list[str]:
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    return ["-O2", "-std=c++20", "-shared", "-fPIC", "-w", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]


def _load(file: Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader(file.stem, str(file))
    spec = importlib.util.spec_from_file_location(file.stem, file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.own_folder(str(HERE))
    return module
