"""The program of bench coexec-overlap gives eager's values on one thread and on two."""

from regraft.benchmarks import coexec_overlap
from tests.runtime.coexec.conftest import one_build  # noqa: F401


def test_a_row_has_both_sides_and_no_difference(monkeypatch):
    monkeypatch.setattr(coexec_overlap, "WIDTH", 16)
    result = coexec_overlap.run(quick=True)
    (row,) = result.rows
    assert row["differs"] == 0 and result.checks[-1].holds  # the others are of speed
    assert 1 < row["bound"] <= 2 and row["two threads ms"] > 0 and row["one thread ms"] > 0
    assert row["serial / overlapped"] == row["one thread ms"] / row["two threads ms"]
    assert row["python ms"] > 0 and row["graph stall ms"] >= 0
