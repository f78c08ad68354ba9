"""What every suite shares: results, the machine they were taken on, and interleaved timing."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Check:
    """A target such as ">= 1.5" and whether the measured value holds it; None: not measured."""

    name: str
    value: float | None
    target: str
    holds: bool | None

    @classmethod
    def at_least(cls, name: str, value: float | None, limit: float) -> Check:
        return cls(name, value, f">= {limit:g}", None if value is None else value >= limit)

    @classmethod
    def at_most(cls, name: str, value: float | None, limit: float) -> Check:
        return cls(name, value, f"<= {limit:g}", None if value is None else value <= limit)


@dataclass
class Result:
    """Rows share their keys. ``chart`` names the column to plot as bars, or ``curves`` those of x,
    y and what tells the curves apart, y by matplotlib's ``scale``; ``extra`` joins the JSON."""

    command: str
    environment: dict[str, Any]
    rows: list[dict[str, Any]]
    checks: list[Check]
    chart: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    curves: tuple[str, str, str] | None = None
    scale: str = "linear"

    def to_dict(self) -> dict[str, Any]:
        return {
            "command": self.command,
            "environment": self.environment,
            "rows": self.rows,
            "checks": [vars(check) for check in self.checks],
            **self.extra,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def to_csv(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]) if self.rows else [])
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        verdicts = {True: "yes", False: "NO", None: "not measured"}
        checks = [
            {"check": c.name, "value": c.value, "target": c.target, "holds": verdicts[c.holds]}
            for c in self.checks
        ]
        machine = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        parts = [f"`{self.command}`", _table(self.rows), _table(checks), machine]
        return "\n\n".join(part for part in parts if part) + "\n"

    def write(self, path: str | Path) -> None:
        """The JSON at path; the same tables as .md and, with matplotlib, a .png beside it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json() + "\n")
        path.with_suffix(".md").write_text(self.to_markdown())
        if self.chart or self.curves:
            self._plot(path.with_suffix(".png"))

    def _plot(self, path: Path) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        if self.curves:
            figure = Figure(figsize=(8, 5), layout="constrained")
            self._draw_curves(figure.add_subplot(), *self.curves)
        else:
            figure = Figure(figsize=(8, 1 + 0.3 * len(self.rows)), layout="constrained")
            self._draw_bars(figure.add_subplot())
        figure.savefig(path, dpi=120)

    def _draw_curves(self, axes: Any, x: str, y: str, series: str) -> None:
        for name in dict.fromkeys(row[series] for row in self.rows):
            rows = [row for row in self.rows if row[series] == name and row.get(y) is not None]
            spread = [row.get("+-") or 0 for row in rows]
            axes.errorbar(
                [row[x] for row in rows], [row[y] for row in rows], spread,
                marker="o", capsize=3, label=name,
            )  # fmt: skip
        axes.set(xlabel=x, ylabel=y, yscale=self.scale)
        axes.grid(alpha=0.3)
        axes.legend()

    def _draw_bars(self, axes: Any) -> None:
        rows = [row for row in self.rows if row.get(self.chart) is not None][::-1]
        keys = [key for key in self.rows[0] if key in ("model", "test", "depth", "stage")]
        labels = [" ".join(str(row[key]) for key in keys) for row in rows]
        axes.barh(labels, [row[self.chart] for row in rows])
        axes.set_xlabel(self.chart)


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[_cell(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def environment() -> dict[str, Any]:
    import torch
    import transformers

    import regraft

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "regraft": regraft.__version__,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch on this many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; the function it gives begins the next of ``total`` stages."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr)) as bar:
        task = bar.add_task(title, total=total)
        done = count()
        yield lambda stage: bar.update(task, completed=next(done), description=f"{title}: {stage}")
        bar.update(task, completed=total, description=title)


def interleaved(
    functions: dict[str, Callable[[], Any]], rounds: int, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of each function's turns, one after the other a round; warm: a first one untimed."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + warm):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn or not warm:
                samples[name].append(time.perf_counter() - start)
    return samples
