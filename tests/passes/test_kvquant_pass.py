import itertools

import pytest
import torch

import regraft
from regraft.frontends.huggingface import capture
from regraft.passes import CleanUp, Context, KVQuant, RaiseAttention, run
from regraft.passes.budget import Option, cheapest, effective_bits
from regraft.passes.calibrate import KINDS, Samples, fit, pieces
from regraft.program import RegraftError
from regraft.program.calibration import load_calibration, save_calibration
from tests.conftest import tiny

GENERATOR = torch.Generator().manual_seed(0)
TEXT = [torch.randint(3, 256, (2, 200), generator=GENERATOR)]


def compiled(model, **settings):
    return regraft.compile(model, [KVQuant(**settings)], calibration=TEXT)


def settings_of(model, index=0):
    return dict(model.program.cache.layers[index].settings)


def logits(model, ids):
    cache = model.new_cache()
    model(ids[:, :150], past_key_values=cache)
    return model(ids[:, 150:], past_key_values=cache).logits


@pytest.fixture(scope="module")
def calibrated(llama):
    return compiled(llama, bits={"key": 3, "value": 2}, layers={1: {"key": 4}})


def test_settings_and_tensors_of_each_layer(calibrated):
    first, second = calibrated.program.cache.layers
    assert (settings_of(calibrated)["key_bits"], settings_of(calibrated)["value_bits"]) == (3, 2)
    assert settings_of(calibrated, 1)["key_bits"] == 4
    assert len(first.tensors["key_levels"]) == 8 and len(second.tensors["key_levels"]) == 16
    assert first.tensors["key_scale"].shape == (1, 2, 1, 16)


def test_saved_and_loaded_models_read_alike(llama, calibrated, tmp_path):
    ids = torch.randint(3, 256, (1, 180), generator=GENERATOR)
    expected = logits(calibrated, ids)
    calibrated.save(tmp_path / "model")
    assert torch.equal(logits(regraft.load(tmp_path / "model"), ids), expected)
    file = str(tmp_path / "calibration.safetensors")
    save_calibration(calibrated.program.cache, file)
    asked = KVQuant(bits={"key": 3, "value": 2}, layers={1: {"key": 4}}, calibration=file)
    for _ in range(2):
        again = regraft.compile(llama, [asked])
        assert torch.equal(logits(again, ids), expected)


def test_another_file_is_another_program(llama, calibrated, tmp_path):
    file = tmp_path / "calibration.safetensors"
    save_calibration(calibrated.program.cache, file)
    before = KVQuant(calibration=str(file)).identity()
    file.write_bytes(file.read_bytes() + b" ")
    assert KVQuant(calibration=str(file)).identity() != before


def test_files_that_do_not_fit(llama, calibrated, tmp_path):
    file = tmp_path / "calibration.safetensors"
    save_calibration(calibrated.program.cache, file)
    with pytest.raises(RegraftError, match="layer 0 was calibrated for"):
        regraft.compile(llama, [KVQuant(bits=4, calibration=str(file))])
    with pytest.raises(RegraftError, match="2 layers, the model 1"):
        regraft.compile(tiny("llama", num_hidden_layers=1), [KVQuant(calibration=str(file))])
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RegraftError, match="no sound calibration"):
        load_calibration(file)
    with pytest.raises(RegraftError, match="was not calibrated"):
        save_calibration(regraft.compile(llama, [KVQuant()]).program.cache, file)


def test_without_calibration_the_report_says_so(llama):
    free = regraft.compile(llama, [KVQuant(bits=3)])
    assert settings_of(free)["codebook"] == "lloyd_max"
    assert not free.program.cache.layers[0].tensors
    assert "none was given: codes are data-free" in str(free.report)


@pytest.mark.parametrize("codebook", ["lloyd_max", "normal_float", "uniform", "rotated"])
def test_data_free_codebooks_follow_the_model(llama, codebook):
    ids = torch.randint(0, 256, (1, 220), generator=torch.Generator().manual_seed(3))
    expected = llama(ids).logits.detach()[:, 150:]
    errors = []
    for bits in (2, 4, 8):
        model = regraft.compile(llama, [KVQuant(bits=bits, codebook=codebook)])
        past = model(input_ids=ids[:, :150]).past_key_values
        found = model(input_ids=ids[:, 150:], past_key_values=past).logits.detach()
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.1 and errors[2] < 0.01


def test_sixteen_bits_stay_dense(llama, calibrated):
    ids = torch.randint(0, 256, (1, 150), generator=torch.Generator().manual_seed(3))
    model = regraft.compile(llama, [KVQuant(bits=16)])
    assert [layer.format for layer in model.program.cache.layers] == ["dense"] * 2
    past = model(input_ids=ids[:, :140]).past_key_values
    found = model(input_ids=ids[:, 140:], past_key_values=past).logits.detach()
    torch.testing.assert_close(found, llama(ids).logits.detach()[:, 140:], atol=1e-4, rtol=1e-4)
    exact = {0: {"key": 16, "value": 16}}
    mixed = compiled(llama, bits=3.5, layers=exact)
    assert [layer.format for layer in mixed.program.cache.layers] == ["dense", "kvquant"]
    with pytest.raises(RegraftError, match="16 for keys and values"):
        KVQuant(bits={"key": 16, "value": 4})


def test_budget_is_kept_and_spent(llama):
    model = compiled(llama, bits=3.5)
    found = [settings_of(model, i) for i in range(2)]
    spent = sum(
        32 * s[f"{kind}_bits"]
        + (32 + 3 if s[f"{kind}_outliers"] else 0)
        + (32 if kind == "value" else 0)
        for s in found
        for kind in KINDS
    )
    assert 3.5 * 128 - 32 <= spent <= 3.5 * 128
    with pytest.raises(RegraftError, match="too little"):
        compiled(llama, bits=1.5)
    with pytest.raises(RegraftError, match="needs calibration"):
        regraft.compile(llama, [KVQuant(bits=3.5)])


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([torch.zeros(0, 8, dtype=torch.long)], "is empty"),
        ([torch.full((1, 300), 256)], "token 256, the model knows 256"),
        ([torch.full((1, 40), 5)], "tokens after the sink"),
        ([torch.rand(1, 300)], "batches of token ids"),
    ],
)
def test_bad_calibration_names_the_mend(llama, calibration, message):
    with pytest.raises(RegraftError, match=message):
        regraft.compile(llama, [KVQuant()], calibration=calibration)


def test_activations_that_are_not_finite_name_the_layer():
    model = tiny("llama")
    program = capture(model)
    run(program, [CleanUp(), RaiseAttention()], Context())
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3] = float("inf")
    with pytest.raises(RegraftError, match=r"values of .*layers\.1.* not finite"):
        run(program, [KVQuant()], Context(TEXT))


def test_padding_is_left_out():
    ids = torch.arange(10).view(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    found = pieces([{"input_ids": ids, "attention_mask": mask}], 10)
    assert [x.tolist() for x in found] == [[[2, 3, 4]], [[5, 6, 7, 8, 9]]]


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 5},
        {"bits": {"query": 4}},
        {"codebook": "fp4"},
        {"group": 48},
        {"outliers": -0.1},
        {"bits": 3.35, "codebook": "uniform"},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(RegraftError, match="KVQuant"):
        KVQuant(**settings)


@pytest.fixture(scope="module")
def samples():
    """Heavy-tailed keys of unlike channels, with weights that differ by channel."""
    generator = torch.Generator().manual_seed(1)
    size = torch.rand(1, 2, 1, 16, generator=generator) * 4 + 0.1
    x = torch.randn(1, 2, 640, 16, generator=generator) * size + 3 * size
    x[:, :, ::37] *= 4
    gradient = torch.randn(1, 2, 640, 16, generator=generator) / size.flip(3)
    return Samples(x.half(), gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_and_outliers_lower_the_error(samples, kind):
    errors = [fit(kind, samples, bits, 0.05, False).error for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    none, some, every = (fit(kind, samples, 3, share, False).error for share in (0, 0.05, 1))
    assert some < 0.8 * none
    assert every < 1e-3 * none


def test_more_rounds_fit_keys_better(samples, monkeypatch):
    errors = []
    for rounds in (0, 3):
        monkeypatch.setattr("regraft.passes.calibrate.ROUNDS", rounds)
        errors.append(fit("key", samples, 2, 0.05, False).error)
    assert errors[1] < errors[0]


def test_knapsack_is_the_optimum():
    generator = torch.Generator().manual_seed(4)
    options = [
        [Option(32 * b + 7 * (i % 2), torch.rand(1, generator=generator).item() / b, b)
         for b in (2, 3, 4)]
        for i in range(5)
    ]  # fmt: skip
    for limit in (345, 400, 470, 700):
        found = cheapest(options, limit)
        every = itertools.product(*options)
        best = min(
            sum(o.error for o in each) for each in every if sum(o.bits for o in each) <= limit
        )
        assert sum(o.bits for o in found) <= limit
        assert sum(o.error for o in found) == pytest.approx(best)
    with pytest.raises(ValueError, match="the least is"):
        cheapest(options, 300)


@pytest.mark.parametrize(("bits", "paper"), [(4, 4.35), (3, 3.35), (2, 2.35)])
@pytest.mark.parametrize(("heads", "size"), [(8, 128), (32, 128), (16, 64)])
def test_effective_bits_are_the_papers(bits, paper, heads, size):
    assert effective_bits(bits, bits, 0.01, heads, size) == pytest.approx(paper, abs=0.05)
