import pytest
import torch

import regraft
from regraft.passes import Context, FuseLinear, OutlineLayers, Prune, WeightQuant, run
from regraft.program import RegraftError
from tests.conftest import tiny

PACKED = torch.ops.regraft.packed_linear.default


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    "settings", [dict(bits=8), dict(bits=4), dict(bits=8, group=None)], ids=str
)
def test_a_model_stays_close(llama, settings):
    ids = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    fast = regraft.compile(llama, [WeightQuant(**settings)])
    wanted, found = logits(llama, ids), logits(fast, ids)
    error = float((found - wanted).norm() / wanted.norm())
    assert 1e-4 < error < (0.02 if settings["bits"] == 8 else 0.25)
    graph = fast.program.graph
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    row = next(row for row in fast.report.rows if row.name == "WeightQuant")
    assert row.matches == 4 * 2 + 1 and "of their norm" in row.picture


def test_finer_groups_err_less():
    model = tiny("llama", hidden_size=128, intermediate_size=256, num_attention_heads=8)
    ids = torch.arange(3, 60)[None]
    wanted, errors = logits(model, ids), []
    for group in (128, 64, 32):
        fast = regraft.compile(model, [WeightQuant(bits=4, group=group)], target="reference")
        errors.append(float((logits(fast, ids) - wanted).norm()))
    assert errors[0] > errors[1] > errors[2]


def test_with_a_quantised_cache_saved_and_loaded(llama, tmp_path, batch):
    fast = regraft.compile(llama, [regraft.KVQuant(bits=4), WeightQuant(bits=8)])
    out = fast.generate(**batch, max_new_tokens=8, do_sample=False)
    fast.save(tmp_path / "saved")
    again = regraft.load(tmp_path / "saved")
    assert torch.equal(again.generate(**batch, max_new_tokens=8, do_sample=False), out)
    assert again(**batch).logits.equal(fast(**batch).logits)


def test_calibration_runs_over_packed_weights(llama):
    calibration = [torch.randint(3, 256, (1, 300))]
    fast = regraft.compile(
        llama, [WeightQuant(bits=8), regraft.KVQuant(bits=4)], calibration=calibration
    )
    assert fast.program.cache.layers[0].tensors


def test_half_precision_models():
    model = tiny("llama").to(torch.bfloat16)
    ids = torch.arange(3, 20)[None]
    fast = regraft.compile(model, [WeightQuant(bits=8)])
    wanted, found = logits(model, ids), logits(fast, ids)
    assert found.dtype == torch.bfloat16 and (found - wanted).norm() <= 0.03 * wanted.norm()


def test_layers_with_a_bias_and_encoders():
    model = torch.nn.Sequential(torch.nn.Linear(64, 40), torch.nn.GELU(), torch.nn.Linear(40, 7))
    x = torch.randn(5, 64)
    fast = regraft.compile(model, [WeightQuant(bits=8, group=None)], example_inputs=(x,))
    with torch.no_grad():
        wanted = model(x)
    assert 0 < (fast(x) - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.parametrize(
    "settings",
    [dict(bits=3), dict(group=48), dict(bits=4, group=None), dict(method="gptq")],
    ids=str,
)
def test_settings_that_do_not_exist(settings):
    with pytest.raises(RegraftError, match="WeightQuant"):
        WeightQuant(**settings)


def test_groups_that_do_not_divide():
    model = torch.nn.Sequential(torch.nn.Linear(48, 8))
    with pytest.raises(RegraftError, match="0: 48 columns do not divide into groups of 32"):
        regraft.compile(model, [WeightQuant()], example_inputs=(torch.ones(1, 48),))


def test_transposed_weights_are_packed():
    fast = regraft.compile(tiny("gpt2"), [WeightQuant(bits=8)], target="reference")
    row = next(row for row in fast.report.rows if row.name == "WeightQuant")
    assert row.matches == 4 * 2 + 1
    targets = {node.target for node in fast.program.graph.nodes}
    assert PACKED in targets and torch.ops.aten.addmm.default not in targets


def test_weights_that_are_no_numbers():
    model = torch.nn.Sequential(torch.nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight[3, 5] = float("nan")
    with pytest.raises(RegraftError, match="WeightQuant: 0: it holds weights that are no finite"):
        regraft.compile(model, [WeightQuant()], example_inputs=(torch.ones(1, 64),))


def test_passes_that_need_float_weights_refuse(llama):
    calibration = [torch.randint(3, 256, (1, 32))]
    for after in (Prune(macs=0.5), WeightQuant(bits=4)):
        name = type(after).__name__
        with pytest.raises(RegraftError, match=f"{name} needs float weights.*put {name} before"):
            regraft.compile(llama, [WeightQuant(), after], calibration=calibration)


def test_pruned_models_are_quantised(llama):
    calibration = [torch.randint(3, 256, (1, 32)) for _ in range(4)]
    passes = [Prune(macs=0.7), WeightQuant(bits=8, group=None)]
    fast = regraft.compile(llama, passes, calibration=calibration, target="reference")
    pruned = regraft.compile(llama, passes[:1], calibration=calibration, target="reference")
    ids = torch.arange(3, 20)[None]
    wanted = logits(pruned, ids)
    assert 0 < (logits(fast, ids) - wanted).norm() <= 0.05 * wanted.norm()


def test_packed_layers_of_one_input_are_fused():
    from regraft.frontends.module import capture_module

    class Three(torch.nn.Module):
        def __init__(self):
            super().__init__()
            sizes = (16, 32, 24)
            self.parts = torch.nn.ModuleList(torch.nn.Linear(64, n, bias=False) for n in sizes)

        def forward(self, x):
            return torch.cat([part(x) * (i + 1) for i, part in enumerate(self.parts)], -1)

    model, x = Three(), torch.randn(2, 64)
    program = capture_module(model, (x,), None)
    run(program, [WeightQuant()], Context())
    before = program(x)
    before = before[0] if isinstance(before, tuple) else before
    run(program, [FuseLinear(), OutlineLayers()], Context())
    nodes = program.graph.find_nodes(op="call_function", target=PACKED)
    assert sorted(node.args[4] for node in nodes) == [24, 48]  # a partial tile stays alone
    after = program(x)
    after = after[0] if isinstance(after, tuple) else after
    assert torch.equal(before, after)
