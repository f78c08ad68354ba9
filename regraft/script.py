"""``regraft inspect --coexec SCRIPT``: a script run as python does, then what was co-executed."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from regraft import show
from regraft.program.errors import RegraftError


def arguments(context: Any, file: str, script: str) -> list[str]:
    """The script and its own arguments, empty without one; what inspect does not know is theirs."""
    own = [file, *context.args] if file else context.args
    if not script:
        for name in own[:1] if file.startswith("-") else own[1:]:
            context.fail(f"No such option: {name}" if name[0] == "-" else f"Unexpected: {name}")
        return []
    for name in ("model", "kv_bits", "graph", "diff", "markdown"):
        if context.get_parameter_source(name).name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise RegraftError(f"{option} is not for --coexec; a script's own options follow --")
    return [script, *own]


def inspect(arguments: list[str], picture: Path | None, put: Callable[[Any], None]) -> None:
    """Run a script, or a module by its dotted name, and put its reports, also where it fails."""
    from regraft.runtime.coexec.picture import dot, svg
    from regraft.runtime.coexec.report import watching

    draw = {".svg": svg, ".dot": dot}.get(picture.suffix if picture else ".svg")
    if draw is None:
        raise RegraftError(f"--picture {picture}: an .svg or a .dot file")
    script = arguments[0]
    if not Path(script).is_file() and not _is_module(script):
        raise RegraftError(f"{script} is neither a script nor the name of a module")
    argv, path = sys.argv, sys.path[:]
    with watching() as watch:
        try:
            sys.argv = arguments
            _run(script)
        finally:
            sys.argv, sys.path[:] = argv, path
            reports = [report for report in watch.reports() if report.calls]
            for report in reports:
                for table in show.coexecution(report):
                    put(table)
            if not reports:
                put(f"{script} co-executed nothing: wrap a function in regraft.coexecute")
            elif picture is not None:
                picture.write_text(draw(*(report.graph() for report in reports)), encoding="utf-8")
                put(f"{picture}: the paths of {', '.join(report.name for report in reports)}")


def _is_module(name: str) -> bool:
    sys.path.insert(0, "")
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
    finally:
        sys.path.remove("")


def _run(script: str) -> None:
    if Path(script).is_file():
        sys.path.insert(0, str(Path(script).resolve().parent))
        runpy.run_path(script, run_name="__main__")
    else:
        sys.path.insert(0, "")
        runpy.run_module(script, run_name="__main__", alter_sys=True)
