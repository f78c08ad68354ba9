"""What code that is compiled for this machine depends on besides what it computes."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Versions, processor and threads, as JSON takes them."""
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def environment(**variables: str) -> dict[str, str]:
    """Of a Python process that finds the modules this one does, with these variables."""
    path = os.pathsep.join(dict.fromkeys(filter(None, sys.path)))
    return {**os.environ, "PYTHONPATH": path, **variables}


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:16]
