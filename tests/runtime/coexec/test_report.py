"""What is shown of co-execution: counts, the graph of paths, whole scripts."""

import re
import sys
import xml.etree.ElementTree as xml

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import regraft
from regraft import show
from regraft.benchmarks.programs import PROGRAMS
from regraft.cli import app
from regraft.program import RegraftError
from regraft.runtime.coexec.blocks import blocks
from regraft.runtime.coexec.report import Report

REPLAY = {"backend": "replay", "measure": False}


def branching(calls=24, overlap=False):
    """Calls of two kinds, each with a loop until a value is large."""
    layer = nn.Linear(4, 4)

    @regraft.coexecute(**REPLAY, overlap=overlap)
    @torch.no_grad()
    def step(call):
        x = layer(torch.ones(2, 4))
        x = x.relu() if call % 3 else x.sigmoid()
        total = 0.0
        while total < 3:
            x = x.abs() + 0.3
            total = x.sum().item() / 4
        return total

    for call in range(calls):
        step(call)
    return step.report()


def texts(svg):
    return [node.text for node in xml.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_branches_and_loops_are_blocks():
    report = branching()
    (start,) = blocks(report.traces)
    while len(start.children) == 1:
        (start,) = start.children
    assert sum(child.visits for child in start.children) == start.visits == 24
    first, second = start.children  # the more visited first
    assert (first.visits, second.visits) == (16, 8)
    assert (first.operators[0], second.operators[0]) == ("relu", "sigmoid")
    assert all("test_report.py" in child.line for child in (first, second))
    loops = [b for child in (first, second) for b in (child, *child.children) if b.turns > 1]
    assert loops and all(set(loop.operators) == {"abs", "add", "sum", "div"} or loop.waits
                         for loop in loops)  # fmt: skip
    assert len({line for loop in loops for line in loop.waits}) == 1


def test_the_picture_holds_what_it_shows(tmp_path):
    report = branching()
    report.svg(tmp_path / "paths.svg")
    found = texts((tmp_path / "paths.svg").read_text())
    assert found[0] == "branching.<locals>.step" and "24 calls" in found[1]
    assert {"24×", "16×", "8×"} <= set(found)
    assert any(text.startswith("Python waits") and "test_report.py:" in text for text in found)
    assert any("turns of" in text for text in found)
    root = xml.fromstring((tmp_path / "paths.svg").read_text())
    boxes = [
        [float(node.get(key)) for key in ("x", "y", "width", "height")]
        for node in root.iter("{http://www.w3.org/2000/svg}rect")
        if node.get("rx")
    ]
    width, height = float(root.get("width")), float(root.get("height"))
    for i, (x, y, w, h) in enumerate(boxes):
        assert x >= 0 and x + w <= width and y + h <= height
        for left, top, other, tall in boxes[:i]:
            assert x + w <= left or left + other <= x or y + h <= top or top + tall <= y


def test_graphviz_has_the_same_nodes(tmp_path):
    report = branching()
    dot = report.dot()
    assert dot.startswith("digraph") and dot.count("{") == dot.count("}")
    nodes = re.findall(r"^    (n\d+) \[label=", dot, re.M)
    edges = re.findall(r"(n\d+) -> (n\d+) \[label=\"(\d+)\"", dot)
    assert len(nodes) == len(set(nodes)) and {n for a, b, _ in edges for n in (a, b)} == set(nodes)
    assert [visits for _, _, visits in edges][:2] == ["24", "16"]


def test_programs_without_end_stay_small():
    program = PROGRAMS["TreeLSTM"]()
    step = regraft.coexecute(program.step, **REPLAY)
    for _ in range(60):
        step()
    dot = step.report().dot()
    assert step.report().nodes > 5000 and len(dot.splitlines()) < 250
    assert "more" in dot


def test_a_report_without_calls_has_a_picture(tmp_path):
    regraft.coexecute(lambda: 1).report().svg(tmp_path / "empty.svg")
    assert "start" in texts((tmp_path / "empty.svg").read_text())


def test_fields_of_compiled_segments_are_read_where_there_are_any():
    report = branching(4)
    assert report.segments == [] and report.compile_s == 0 and report.graph_stall_s > 0
    stats = {**vars(report), "reasons": {}, "segments": [(7, 3, 0.5, "compiled")], "compile_s": 0.5}
    report.add(stats, [])
    assert report.segments == [(7, 3, 0.5, "compiled")] and "1 of 1 compiled in 0.5 s" in str(
        report
    )
    (*_, table) = show.coexecution(report)
    assert [list(column.cells) for column in table.columns] == [
        ["7 operators"], ["3"], ["0.50"], ["compiled"]
    ]  # fmt: skip


def test_functions_called_in_a_block_are_part_of_it(notices):
    step = regraft.coexecute(lambda x: (x * 2).sum().item())
    with regraft.coexecution() as report:
        assert [step(torch.ones(3)) for _ in range(30)] == [6.0] * 30
    assert report().deferred > 50 and step.report().calls == 0 and not notices
    assert step(torch.ones(3)) == 6 and step.report().mode == "warming up"


def test_stalls_are_those_of_the_side_that_is_slower():
    def graph(x):
        for _ in range(30):
            x = x @ x * 0.01
        return x.sum().item()

    def python(x):
        return (x + sum(range(300_000))).sum().item()

    x = torch.ones(200, 200)
    reports = {}
    for function in (graph, python):
        step = regraft.coexecute(function, **REPLAY, overlap=False)
        for _ in range(4):
            step(x)
        reports[function] = step.report()
    assert reports[graph].stall_s > reports[graph].graph_stall_s / 4
    assert reports[python].graph_stall_s > reports[python].stall_s


def test_blocks_of_one_place_give_their_engine_back():
    from regraft.runtime.coexec import function

    def once():
        with regraft.coexecution() as report:
            (torch.ones(3) * 2).tolist()
        assert report().name == f"block at {__file__}:{once.__code__.co_firstlineno + 1}"
        assert report().recorded

    once()
    free = len(function._pool)
    for _ in range(5):
        once()
    assert len(function._pool) == free > 0


SCRIPT = f"""
REPLAY = {REPLAY}
'''A program with arguments.'''
import sys, torch, regraft
from helper import scale

@regraft.coexecute(**REPLAY)
def step(x):
    return (x * scale).sum().item()

@regraft.coexecute
def never(x):
    return x

for _ in range(int(sys.argv[2])):
    step(torch.ones(3))
for _ in range(2):
    with regraft.coexecution():
        torch.ones(2).add(1).tolist()
print(__name__, sys.argv[1:])
if "fail" in sys.argv:
    raise SystemExit(3)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "helper.py").write_text("scale = 2")
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path / "train.py"


def inspect(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "160"})


def test_inspect_runs_a_script_and_shows_what_was_co_executed(script, tmp_path, monkeypatch):
    before = sys.argv, sys.path[:]
    monkeypatch.chdir(tmp_path)  # long names of folders would wrap
    picture = tmp_path / "out.svg"
    result = inspect("--coexec", script.name, "--epochs", 5, "data", "--picture", picture)
    assert result.exit_code == 0, result.output
    assert "__main__ ['--epochs', '5', 'data']" in result.stdout
    assert "step" in result.stdout and "co-executed on two threads, 5 calls" in result.stdout
    assert "train.py:9" in result.stdout and "never" not in result.stdout
    assert result.stdout.count("block at") == 2  # two blocks in one table, and the picture's line
    assert {"step", "start"} <= set(texts(picture.read_text()))
    assert (sys.argv, sys.path) == before
    sys.modules.pop("helper")


def test_inspect_reports_before_a_scripts_exit_is_passed_on(script):
    result = inspect("--coexec", script, "--", "--graph", 3, "fail")
    assert result.exit_code == 3 and "['--graph', '3', 'fail']" in result.stdout
    assert "3 calls" in result.stdout
    sys.modules.pop("helper")


def test_inspect_of_what_is_no_script(script, tmp_path):
    (tmp_path / "plain.py").write_text("print('plain')")
    assert "co-executed nothing" in inspect("--coexec", tmp_path / "plain.py").stdout
    assert "co-executed nothing" in inspect("--coexec", "this").stdout  # a module, as python -m
    for arguments, message in (
        (["--coexec", "no.such.module"], "neither a script nor"),
        (["--coexec", script, "--model", "x"], "--model is not for --coexec"),
        (["--coexec", script, "--picture", "out.jpg"], "an .svg or a .dot file"),
    ):
        error = inspect(*arguments).exception
        assert isinstance(error, RegraftError) and message in str(error)
    assert "No such option: --modle" in inspect("--modle", "x").output


def test_reports_of_one_place_add_up():
    one, other = branching(3), branching(5)
    one.join(other)
    assert one.calls == 8 and len(one.traces) == 2
    assert sum(block.visits for block in blocks(one.traces)) == 8
    assert isinstance(one, Report) and one.deferred > other.deferred
