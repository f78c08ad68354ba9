"""What each pass did and what it cost."""

from dataclasses import dataclass, field
from io import StringIO

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One pass: matches, (where, reason) of what it skipped, size, seconds, error it added.

    ``max_abs_error`` is the largest change of the outputs on the sample inputs, None where the
    pass does not change what the functional graph computes (a cache format, say). ``picture``:
    lines that a pass adds to the report.
    """

    name: str
    matches: int
    skipped: tuple[tuple[str, str], ...]
    nodes_before: int
    nodes_after: int
    seconds: float
    max_abs_error: float | None
    picture: str = ""


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)

    def table(self) -> Table:
        table = Table(title="passes")
        for column in ("pass", "matches", "skipped", "nodes", "seconds", "max |error|"):
            table.add_column(column, justify="left" if column == "pass" else "right")
        for row in self.rows:
            error = "-" if row.max_abs_error is None else f"{row.max_abs_error:.1e}"
            nodes = f"{row.nodes_before} -> {row.nodes_after}"
            skipped = str(len(row.skipped))
            table.add_row(row.name, str(row.matches), skipped, nodes, f"{row.seconds:.2f}", error)
        return table

    def __str__(self) -> str:
        console = Console(width=100, record=True, file=StringIO())
        console.print(self.table())
        for row in self.rows:
            for where, reason in row.skipped[:4]:
                console.print(f"{row.name} skipped {where}: {reason}", markup=False)
            if row.picture:
                console.print(row.picture, markup=False, highlight=False)
        return console.export_text()
