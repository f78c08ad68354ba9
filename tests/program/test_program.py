import re

import pytest
import torch

from regraft.frontends.huggingface import capture
from regraft.passes import DEFAULT, FINAL, Context, run
from regraft.program.program import source_of
from tests.conftest import tiny


@pytest.fixture(scope="module")
def program(llama):
    return capture(llama)


def test_nodes_keep_their_module_and_line(program):
    linears = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    sources = [source_of(node) for node in linears]
    assert re.fullmatch(
        r"model\.layers\.0\.self_attn\.q_proj \(modeling_llama\.py:\d+\)", sources[0]
    )
    assert sources[-1].startswith("lm_head (modeling_llama.py:")
    lines = [line for line in program.text().split("\n") if "aten.linear" in line]
    assert [line.partition("  # ")[2] for line in lines] == sources
    assert " : torch.float32 [" in lines[0]


def test_raised_nodes_keep_their_module(program):
    raised = program.copy()
    run(raised, DEFAULT, Context())
    target = torch.ops.regraft.cached_attention.default
    nodes = raised.graph.find_nodes(op="call_function", target=target)
    assert [source_of(node).split(" ")[0] for node in nodes] == [
        f"model.layers.{i}.self_attn" for i in range(2)
    ]


def test_called_graphs_are_printed_once():
    outlined = capture(tiny("llama", num_hidden_layers=4))
    run(outlined, [*DEFAULT, *FINAL], Context())
    lines = outlined.text().split("\n")
    names = {str(n.target) for n in outlined.graph.nodes if n.op == "call_module"}
    assert names and all(lines.count(f"{name}:") == 1 for name in names)


def test_diff_as_markdown(program):
    raised = program.copy()
    run(raised, DEFAULT, Context())
    text = program.diff_markdown(raised, "RaiseAttention")
    assert text.startswith("## RaiseAttention\n\n")
    added = sum(line.startswith("+") for line in text.split("\n"))
    counts = f"{len(program.graph.nodes)} -> {len(raised.graph.nodes)} nodes"
    assert counts in text and f"+{added}\n" in text
    assert "```diff\n@@" in text and "\n+cached_attention" in text and text.endswith("\n```")
    assert "```" not in program.diff_markdown(program.copy())
