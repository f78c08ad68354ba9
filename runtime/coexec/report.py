"""What co-execution did: paths, operators put off, waits for values, what ran at once and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """Counts since the function was made.

    symbolic: operators put off, a share of all; fetches: source line to (waits, seconds);
    fallbacks: reason to operators run at once for it; paths: (operators, calls that ended there);
    stall_s: seconds that Python waited; aside_s: seconds that the other thread computed.
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
    aside_s: float = 0.0
    paths: list[tuple[int, int]] = field(default_factory=list)
    fetches: dict[str, tuple[int, float]] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    eager_s: float | None = None
    coexecuted_s: float | None = None

    @property
    def symbolic(self) -> float:
        total = self.deferred + self.recorded + self.at_once
        return self.deferred / total if total else 0.0

    def add(self, stats: dict[str, Any]) -> None:
        """One thread's counts."""
        for key in ("deferred", "recorded", "at_once", "backwards", "backwards_eager", "nodes",
                    "executed_here", "executed_aside", "stall_s", "aside_s"):  # fmt: skip
            setattr(self, key, getattr(self, key) + stats[key])
        self.paths += stats["paths"]
        for line, (count, seconds) in stats["fetches"].items():
            before = self.fetches.get(line, (0, 0.0))
            self.fetches[line] = (before[0] + count, before[1] + seconds)
        for reason, count in stats["reasons"].items():
            self.fallbacks[reason] = self.fallbacks.get(reason, 0) + count

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.mode}, {self.calls} calls",
            f"operators: {self.deferred} put off ({self.symbolic:.0%}), {self.recorded} recorded, "
            f"{self.at_once} at once; backward passes: {self.backwards} put off, "
            f"{self.backwards_eager} at once",
            f"paths: {len(self.paths)} over {self.nodes} nodes; run by Python's thread "
            f"{self.executed_here}, aside {self.executed_aside} in {self.aside_s:.3f} s; "
            f"Python waited {self.stall_s:.3f} s",
        ]
        if self.eager_s is not None and self.coexecuted_s is not None:
            lines.append(
                f"a call: {self.eager_s * 1e3:.3f} ms eager, {self.coexecuted_s * 1e3:.3f} ms so"
            )
        fetches = sorted(self.fetches.items(), key=lambda item: -item[1][1])
        lines += [f"fetch {line}: {n} waits, {s:.4f} s" for line, (n, s) in fetches]
        fallbacks = sorted(self.fallbacks.items(), key=lambda item: -item[1])
        lines += [f"at once, {reason}: {count}" for reason, count in fallbacks]
        return "\n".join(lines)
