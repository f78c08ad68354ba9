"""What co-execution did: paths, operators put off, waits for values, what ran at once and why."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.runtime.coexec.blocks import Node, Start, blocks
from regraft.runtime.coexec.picture import dot, svg

COUNTS = ("deferred", "recorded", "at_once", "backwards", "backwards_eager", "nodes",
          "executed_here", "executed_aside", "stall_s", "aside_s")  # fmt: skip
LATER = {
    "graph_stall_s": 0.0,
    "compile_s": 0.0,
    "ahead": 0,
    "strayed": 0,
}  # counts that an engine may lack
_watchers: list[Watch] = []


@dataclass
class Report:
    """Counts since the function was made.

    symbolic: operators put off, a share of all; fetches: source line to (waits, seconds);
    fallbacks: reason to operators run at once for it; paths: (operators, calls that ended there);
    stall_s: seconds that Python waited; graph_stall_s: seconds inside calls in which no operator
    put off ran, at least; aside_s: seconds that the other thread computed. segments: (operators,
    launches, seconds to compile, state); compile_s: seconds in all; ahead, strayed: launches begun
    before their operators had all come, and those taken back since others came. traces: the trace
    graph of each thread, parents first: (parent, operator, visits, ends, source line, waits by
    line).
    """

    name: str
    mode: str
    calls: int = 0
    deferred: int = 0
    recorded: int = 0
    at_once: int = 0
    backwards: int = 0
    backwards_eager: int = 0
    nodes: int = 0
    executed_here: int = 0
    executed_aside: int = 0
    stall_s: float = 0.0
    graph_stall_s: float = 0.0
    aside_s: float = 0.0
    compile_s: float = 0.0
    ahead: int = 0
    strayed: int = 0
    segments: list[tuple[int, int, float, str]] = field(default_factory=list)
    paths: list[tuple[int, int]] = field(default_factory=list)
    fetches: dict[str, tuple[int, float]] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    eager_s: float | None = None
    coexecuted_s: float | None = None
    traces: list[list[Node]] = field(default_factory=list, repr=False)

    @property
    def symbolic(self) -> float:
        total = self.deferred + self.recorded + self.at_once
        return self.deferred / total if total else 0.0

    @property
    def compiled(self) -> str:
        made = sum(state == "compiled" for *_, state in self.segments)
        return f"{made} of {len(self.segments)} compiled"

    def add(self, stats: dict[str, Any], trace: list[Node]) -> None:
        """One thread's counts and graph."""
        for key in COUNTS:
            setattr(self, key, getattr(self, key) + stats[key])
        for key, default in LATER.items():
            setattr(self, key, getattr(self, key) + stats.get(key, default))
        self.paths += stats["paths"]
        self.segments += stats.get("segments", [])
        for line, (count, seconds) in stats["fetches"].items():
            before = self.fetches.get(line, (0, 0.0))
            self.fetches[line] = (before[0] + count, before[1] + seconds)
        for reason, count in stats["reasons"].items():
            self.fallbacks[reason] = self.fallbacks.get(reason, 0) + count
        self.traces.append(trace)

    def join(self, other: Report) -> None:
        """What another report of the same place counted, too."""
        self.add({**vars(other), "reasons": other.fallbacks}, [])
        self.traces[-1:] = other.traces
        self.calls += other.calls

    def dot(self) -> str:
        """The trace graph as Graphviz text, runs of operators as one node each."""
        return dot(self.graph())

    def svg(self, path: str | Path) -> None:
        """Write the same as a picture."""
        Path(path).write_text(svg(self.graph()), encoding="utf-8")

    def graph(self) -> Start:
        calls = f"{self.calls} call{'s' * (self.calls != 1)}"
        about = f"{self.mode}, {calls}, {self.symbolic:.0%} of the operators put off"
        return Start(self.name, about, blocks(self.traces))

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.mode}, {self.calls} calls",
            f"operators: {self.deferred} put off ({self.symbolic:.0%}), {self.recorded} recorded, "
            f"{self.at_once} at once; backward passes: {self.backwards} put off, "
            f"{self.backwards_eager} at once",
            f"paths: {len(self.paths)} over {self.nodes} nodes; run by Python's thread "
            f"{self.executed_here}, aside {self.executed_aside} in {self.aside_s:.3f} s; "
            f"Python waited {self.stall_s:.3f} s, the operators {self.graph_stall_s:.3f} s",
        ]
        if self.segments:
            begun = f"; {self.ahead} launches begun ahead, {self.strayed} taken back"
            lines.append(f"segments: {self.compiled} in {self.compile_s:.1f} s{begun}")
        if self.eager_s is not None and self.coexecuted_s is not None:
            lines.append(
                f"a call: {self.eager_s * 1e3:.3f} ms eager, {self.coexecuted_s * 1e3:.3f} ms so"
            )
        fetches = sorted(self.fetches.items(), key=lambda item: -item[1][1])
        lines += [f"fetch {line}: {n} waits, {s:.4f} s" for line, (n, s) in fetches]
        fallbacks = sorted(self.fallbacks.items(), key=lambda item: -item[1])
        lines += [f"at once, {reason}: {count}" for reason, count in fallbacks]
        return "\n".join(lines)


class Watch:
    """What is co-executed while it watches: functions by their reports, blocks by their place."""

    def __init__(self) -> None:
        self._functions: list[Callable[[], Report]] = []
        self._blocks: dict[str, Report] = {}

    def reports(self) -> list[Report]:
        return [*(report() for report in self._functions), *self._blocks.values()]

    def function(self, report: Callable[[], Report]) -> None:
        self._functions.append(report)

    def block(self, report: Report) -> None:
        if report.name in self._blocks:
            self._blocks[report.name].join(report)
        else:
            self._blocks[report.name] = report


@contextmanager
def watching() -> Iterator[Watch]:
    """Gives what knows of all that is co-executed meanwhile, and keeps it."""
    watch = Watch()
    _watchers.append(watch)
    try:
        yield watch
    finally:
        _watchers.remove(watch)


def made(report: Callable[[], Report]) -> None:
    """A co-executed function, which reports so, is made."""
    for watch in _watchers:
        watch.function(report)


def ended(report: Callable[[], Report]) -> None:
    """A co-executed block, which reports so, ended."""
    for watch in _watchers:
        watch.block(report())


def caller() -> str:
    """file:line of the code that entered the context manager which asks."""
    frame: Any = sys._getframe(2)
    while frame.f_code.co_filename == contextlib.__file__:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
