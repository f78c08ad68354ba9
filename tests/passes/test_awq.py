import pytest
import torch

import regraft
from regraft.frontends.huggingface import capture
from regraft.kernels.linear.formats import Format
from regraft.passes import DEFAULT, Context, KVQuant, RaiseLinear, WeightQuant, awq, run
from regraft.passes.packed import linears
from regraft.passes.recorder import Runner
from regraft.program import RegraftError
from tests.conftest import tiny

CALIBRATION = [torch.randint(3, 256, (4, 60), generator=torch.Generator().manual_seed(i))
               for i in range(3)]  # fmt: skip
IDS = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(9))
MODELS = {"llama": 7, "gemma2": 7, "phi3": 7, "qwen2": 7, "gpt2": 5, "opt": 5, "mixtral": 3}
"""How many tensors of two layers and the head can be divided by scales."""


@pytest.fixture(scope="module")
def uneven():
    """A model some of whose channels are large, and seldom the weights that read them."""
    model = tiny("llama")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight[::9] *= 20
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def error(model, calibration=CALIBRATION, **settings):
    quantised = [WeightQuant(bits=4, **settings)]
    fast = regraft.compile(model, quantised, calibration=calibration, target="reference")
    wanted = logits(model)
    return float((logits(fast) - wanted).norm() / wanted.norm()), fast


def _unrounded_error(model, sites=7):
    """The largest change of logits by scales alone, over the largest logit."""
    program = capture(model)
    context = Context(CALIBRATION)
    run(program, [*DEFAULT, RaiseLinear()], context)
    nodes = linears(program)
    before = Runner(program, {}).logits(IDS)
    scales = awq.smooth(program, nodes, Format(4, 32, zero=True), context)
    assert len(scales.errors) == sites
    assert any((scale != 1).any() for scale in scales.columns.values())
    for node in nodes:
        weight = getattr(program.graph_module, node.args[1].target)
        scaled = _constant(program, node, scales.weight(node, weight))
        node.args = (node.args[0], scaled, *node.args[2:])
    program.graph_module.recompile()
    return (Runner(program, {}).logits(IDS) - before).abs().max() / before.abs().max()


@pytest.mark.parametrize("model_type", MODELS)
def test_scales_change_nothing_but_what_rounding_does(model_type):
    model = tiny(model_type)
    assert _unrounded_error(model, MODELS[model_type]) <= 1e-5
    assert torch.equal(logits(model), logits(tiny(model_type)))


def _constant(program, node, weight):
    name = f"scaled_{node.name}"
    setattr(program.graph_module, name, torch.nn.Parameter(weight.detach(), False))
    with program.graph.inserting_before(node):
        made = program.graph.get_attr(name)
    made.meta = {**node.args[1].meta}
    return made


def test_scales_lower_the_error(uneven):
    plain, _ = error(uneven)
    scaled, fast = error(uneven, method="awq")
    assert scaled < 0.8 * plain
    row = next(row for row in fast.report.rows if row.name == "WeightQuant")
    assert "of the squared error of 7 inputs" in row.picture
    assert [where.split(" ")[0] for where, _ in row.skipped] == [
        f"model.layers.{i}.self_attn.o_proj" for i in range(2)
    ]


def test_what_takes_the_scales_may_have_a_bias():
    class Gated(torch.nn.Module):
        def __init__(self, mlp):
            super().__init__()
            size, wide = mlp.down_proj.weight.shape
            self.gate, self.up = torch.nn.Linear(size, wide), torch.nn.Linear(size, wide)
            self.down = mlp.down_proj

        def forward(self, x):
            return self.down(self.gate(x).sigmoid() * self.up(x))

    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp = Gated(layer.mlp)
    assert _unrounded_error(model) <= 1e-5


def test_the_exponent_0_is_plain_rounding(uneven, monkeypatch):
    monkeypatch.setattr(awq, "STEPS", 1)
    plain, one = error(uneven)
    scaled, other = error(uneven, method="awq")
    assert torch.equal(logits(one), logits(other)) and plain == scaled


def test_a_quantised_cache_beside_it(uneven, tmp_path):
    passes = [WeightQuant(bits=4, method="awq"), KVQuant(bits=4)]
    fast = regraft.compile(uneven, passes, calibration=CALIBRATION)
    assert fast.program.cache.layers[0].tensors
    wanted = logits(uneven)
    assert (logits(fast) - wanted).norm() < 0.3 * wanted.norm()
    fast.save(tmp_path / "saved")
    assert torch.equal(logits(regraft.load(tmp_path / "saved")), logits(fast))


def test_an_export_of_it(uneven, tmp_path):
    pytest.importorskip("onnxruntime")
    _, fast = error(uneven, method="awq")
    errors = fast.export_onnx(tmp_path / "out").errors
    assert errors["prefill"] < 1e-5


def test_it_needs_calibration_of_a_decoder(uneven):
    for calibration in (None, []):
        with pytest.raises(RegraftError, match="needs calibration=: batches of token ids"):
            error(uneven, calibration, method="awq")
    with pytest.raises(RegraftError, match="calibration holds token 999"):
        error(uneven, [torch.tensor([[5, 999, 7]])], method="awq")
    module, x = torch.nn.Sequential(torch.nn.Linear(64, 8)), torch.ones(1, 64)
    with pytest.raises(RegraftError, match="is for decoders"):
        regraft.compile(
            module, [WeightQuant(method="awq")], example_inputs=(x,), calibration=CALIBRATION
        )


def test_what_is_not_finite_is_named():
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[251] = float("inf")
    with pytest.raises(RegraftError, match="what model.layers.0.self_attn.* reads is not finite"):
        error(model, [torch.tensor([[5, 9, 251, 17]])], method="awq")
