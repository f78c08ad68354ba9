import torch

import regraft
from regraft.frontends.huggingface import capture
from regraft.passes import DEFAULT, Context, OutlineLayers, run
from tests.conftest import tiny


def outlined(model, *passes):
    program = capture(model)
    run(program, DEFAULT, Context())
    expected = program(*program.examples)
    report = run(program, [OutlineLayers(), *passes], Context())
    return program, expected, report


def test_identical_layers_become_one_region():
    program, expected, report = outlined(tiny("llama", num_hidden_layers=5))
    calls = program.graph.find_nodes(op="call_module")
    assert [call.target for call in calls] == ["region_0"] * 4
    assert report.rows[0].matches == 4
    weights = {arg for call in calls for arg in call.args if arg.op == "get_attr"}
    assert len(weights) == 4 * 6  # o, norm, gate and up, down, norm, query key value
    for want, got in zip(expected, program(*program.examples), strict=True):
        assert torch.equal(want, got)


def test_layers_of_two_kinds_become_two_regions():
    model = tiny("exaone4", num_hidden_layers=8)
    program, expected, _ = outlined(model)
    calls = program.graph.find_nodes(op="call_module")
    assert calls and torch.equal(expected[0], program(*program.examples)[0])


def test_layers_that_differ_are_left_alone():
    program, _, report = outlined(tiny("llama", num_hidden_layers=2))
    assert report.rows[0].matches == 0
    assert not program.graph.find_nodes(op="call_module")


def test_a_changed_region_is_noticed():
    program, expected, _ = outlined(tiny("llama", num_hidden_layers=4))
    region = program.graph_module.region_0
    silu = region.graph.find_nodes(op="call_function", target=torch.ops.aten.silu.default)[0]
    silu.target = torch.ops.aten.gelu.default
    region.recompile()
    assert not torch.allclose(expected[0], program(*program.examples)[0])


def test_compiled_model_generates_through_its_regions(batch):
    model = tiny("qwen3", num_hidden_layers=4)
    fast = regraft.compile(model)
    assert list(fast.regions) == ["region_0"]
    with torch.no_grad():
        want, got = model(**batch).logits, fast(**batch).logits
    assert (want - got)[batch["attention_mask"].bool()].abs().max() < 1e-5 * want.abs().max()
