"""What another process compiled, a folder each in the cache: libraries, and what they are given and
give as JSON; or one function of Inductor."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from regraft.program.folders import cache_dir, folder_written_whole
from regraft.runtime.coexec.compiled import Whole
from regraft.runtime.coexec.pieces import Pieces
from regraft.runtime.machine import machine

log = logging.getLogger("regraft")
_OPTIONS, _PLACE = "TORCHINDUCTOR_", "TORCHINDUCTOR_CACHE_DIR"
_WHOLE = "whole.bin"
_before: dict[str, Any] | None = None
_SETTINGS: Sequence[tuple[Callable[[], Any], Callable[[Any], None]]] = [
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
]


def name(computed: str) -> str:
    """Of what a stretch computes, as text, here and with the settings of now."""
    given = sorted(x for x in os.environ.items() if x[0].startswith(_OPTIONS) and x[0] != _PLACE)
    text = f"{machine()} {_source()} {given} {settings()} {computed}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def settings() -> Sequence[Any]:
    """Those of now that matter."""
    return [*(get() for get, _ in _SETTINGS), _changed()]


def set_all(found: Sequence[Any]) -> None:
    """As another process has them."""
    from torch._inductor import config

    for (_, put), value in zip(_SETTINGS, found, strict=False):
        put(value)
    defaults = {key: config._config[key].default for key in _changed()}
    for key, value in (defaults | found[-1]).items():
        setattr(config, key, value)


def store(name: str, made: Pieces | Whole) -> bool:
    """Keep it; whether the cache could be written."""
    entry: dict[str, Any] = {"libraries": []}
    if isinstance(made, Pieces):
        entry |= {"places": made.places, "results": made.results}
    try:
        with folder_written_whole(_folder(name)) as folder:
            if isinstance(made, Whole):
                (folder / _WHOLE).write_bytes(made.data)
                entry["libraries"].append(_digest(folder / _WHOLE))
            else:
                for number, file in enumerate(made.files):
                    shutil.copyfile(file, folder / f"{number}.so")
                    entry["libraries"].append(_digest(file))
            (folder / "pieces.json").write_text(json.dumps(entry))
    except OSError as error:
        log.info("regraft: compiled pieces are not kept for next time: %s", error)
        return False
    return True


def fetch(name: str) -> Pieces | Whole | None:
    """That of the name, if it is there and whole."""
    folder = _folder(name)
    if not folder.is_dir():
        return None
    try:
        entry: dict[str, Any] = json.loads((folder / "pieces.json").read_text())
        whole = "places" not in entry
        count = len(entry["libraries"])
        files = [folder / _WHOLE] if whole else [folder / f"{n}.so" for n in range(count)]
        if [_digest(file) for file in files] != entry["libraries"]:
            raise ValueError("a library is not what was written")
        if whole:
            return Whole(files[0].read_bytes())
        return Pieces(entry["places"], entry["results"], files)
    except (OSError, KeyError, TypeError, ValueError) as error:
        log.warning("regraft: compiled pieces are damaged and are made anew: %s", error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


@contextmanager
def own_options() -> Iterator[None]:
    """Options of Inductor that are set in the block, for all threads, are not the program's."""
    global _before
    _before = _changed()
    try:
        yield
    finally:
        _before = None


def _changed() -> dict[str, Any]:
    """Options of Inductor that are not its own; what is not imported has none."""
    if _before is not None:
        return _before
    config: Any = sys.modules.get("torch._inductor.config")
    now = config.save_config_portable() if config else {}
    return {key: now[key] for key in sorted(now) if now[key] != config._config[key].default}


def _folder(name: str) -> Path:
    return cache_dir() / "coexec-pieces" / name


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@cache
def _source() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
