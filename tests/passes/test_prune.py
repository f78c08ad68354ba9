import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification

import regraft
from regraft.passes import KVQuant, Prune
from regraft.passes.pruning.blocks import count_macs
from regraft.passes.pruning.masks import Masks
from regraft.passes.pruning.moments import Moments, ridge
from regraft.passes.pruning.search import rearranged, search
from regraft.passes.recorder import Runner
from regraft.program import RegraftError
from tests.conftest import SMALL, tiny
from tests.passes.masking import dense_blocks, masked

GENERATOR = torch.Generator().manual_seed(0)
TEXT = [torch.randint(3, 256, (1, 48), generator=GENERATOR) for _ in range(24)]


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    sizes = {**SMALL, "num_labels": 3}
    config = AutoConfig.for_model("bert", **{k: v for k, v in sizes.items() if "key" not in k})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=GENERATOR))
    return model


def rows(count=16, labels=False):
    found = []
    for _ in range(count):
        ids = torch.randint(3, 256, (4, 12), generator=GENERATOR)
        mask = torch.ones_like(ids)
        mask[0, 7:] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        found.append(batch | ({"labels": torch.randint(0, 3, (4,))} if labels else {}))
    return found


def pruned(model, calibration, **settings):
    return regraft.compile(model, [Prune(**settings)], calibration=calibration, target="reference")


@pytest.mark.parametrize("method", ["fisher", "reconstruct"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_masked_equals_sliced_within_the_budget(bert, llama, kind, method):
    model, calibration = (bert, rows()) if kind == "bert" else (llama, TEXT)
    made = pruned(model, calibration, macs=0.6, method=method, round_to=4)
    masks = made.program.metadata["masks"]
    assert 0.57 < masks.share <= 0.6
    dense = regraft.compile(model, calibration=TEXT, target="reference").program
    counted = count_macs(made.program, masks.tokens) / count_macs(dense, masks.tokens)
    assert counted == pytest.approx(masks.share, rel=1e-6)
    blocks, _ = dense_blocks(dense)
    runners = Runner(dense, {}), masked(dense, blocks, masks), Runner(made.program, {})
    with torch.no_grad():
        given = dense.examples
        whole, expected, found = (
            r.run(*given)[0] if kind == "bert" else r.logits(TEXT[0]) for r in runners
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - whole).abs().max() > 1e-4
    if kind == "llama":
        states = [s.shape[1] for s in made.program.inputs if s.name.endswith("key")]
        assert states == [len(one.kept) for one in masks.cuts[::2]]
    assert "filters" in str(made.report)


def test_all_kept_equals_dense(bert, llama):
    for model, calibration in ((bert, rows()), (llama, TEXT)):
        made = pruned(model, calibration, macs=1.0, tune=False)
        dense = regraft.compile(model, calibration=TEXT, target="reference").program
        program = made.program
        torch.testing.assert_close(program(*program.examples)[0], dense(*dense.examples)[0])


def test_saved_masks_are_applied_again(bert, tmp_path):
    made = pruned(bert, rows(), macs=0.5, method="reconstruct", round_to=4)
    regraft.save_masks(made.program, tmp_path / "masks.safetensors")
    again = pruned(bert, None, masks=str(tmp_path / "masks.safetensors"))
    inputs = made.program.examples
    assert torch.equal(made.program(*inputs)[0], again.program(*inputs)[0])
    (tmp_path / "masks.safetensors").write_bytes(b"{}")
    with pytest.raises(RegraftError, match="no sound masks"):
        pruned(bert, None, masks=str(tmp_path / "masks.safetensors"))


def test_a_plot_shows_what_was_kept(bert, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    seen = []
    for share in (1.0, 0.4):
        made = pruned(bert, rows(), macs=share, tune=False)
        made.program.metadata["masks"].plot(tmp_path / "masks.png")
        seen.append(image.imread(tmp_path / "masks.png"))
    assert seen[0].shape == seen[1].shape and min(seen[0].shape[:2]) > 100
    assert abs(seen[0] - seen[1]).max() > 0.5


def test_masks_of_another_model_are_refused(bert, llama, tmp_path):
    made = pruned(bert, rows(), macs=0.5, tune=False)
    regraft.save_masks(made.program, tmp_path / "m.safetensors")
    with pytest.raises(RegraftError, match="masks do not fit"):
        pruned(llama, None, masks=str(tmp_path / "m.safetensors"))


def test_a_layer_that_is_cut_whole_keeps_bias_and_residual(bert, tmp_path):
    made = pruned(bert, rows(), macs=0.9, tune=False)
    masks = made.program.metadata["masks"]
    empty = torch.zeros(0, dtype=torch.long)
    cuts = [type(masks.cuts[0])(empty), *masks.cuts[1:3], type(masks.cuts[0])(empty)]
    nothing = Masks(masks.layouts, tuple(cuts), masks.tokens, masks.share)
    nothing.save(tmp_path / "m.safetensors")
    again = pruned(bert, None, masks=str(tmp_path / "m.safetensors"))
    dense = regraft.compile(bert, target="reference").program
    runner = masked(dense, dense_blocks(dense)[0], nothing)
    with torch.no_grad():
        expected = runner.run(*again.program.examples)[0]
    found = again.program(*again.program.examples)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    target = torch.ops.regraft.attention.default
    assert len(again.program.graph.find_nodes(op="call_function", target=target)) == 1


def test_pruned_decoders_generate_save_and_take_a_quantised_cache(llama, tmp_path):
    made = regraft.compile(
        llama, [Prune(macs=0.7, method="reconstruct"), KVQuant(bits=4)], calibration=TEXT
    )
    ids = TEXT[0][:, :20]
    expected = made.generate(ids, max_new_tokens=12, do_sample=False)
    made.save(tmp_path / "model")
    again = regraft.load(tmp_path / "model").generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(expected, again)


def test_pruned_decoders_export(llama, tmp_path):
    made = pruned(llama, TEXT, macs=0.6, method="reconstruct")
    made.export_onnx(tmp_path / "onnx")
    ids = TEXT[0][:, :20]
    expected = made.generate(ids, max_new_tokens=8, do_sample=False)
    loaded = regraft.load(tmp_path / "onnx")
    assert torch.equal(loaded.generate(ids, max_new_tokens=8, do_sample=False), expected)
    torch.testing.assert_close(loaded(ids).logits, made(ids).logits, atol=1e-4, rtol=1e-4)


def test_search_finds_the_best_of_all():
    class Units:
        attention, units, least = object(), 4, 0

    blocks = [Units(), Units()]
    importance = [torch.rand(4, generator=GENERATOR) for _ in blocks]
    cost = [3.0, 2.0]
    kept = search(blocks, importance, lambda i, n: cost[i] * n, 10.0, 1)
    assert sum(c * len(units) for c, units in zip(cost, kept, strict=True)) <= 10.0
    lost = sum(float(i.sum() - i[k].sum()) for i, k in zip(importance, kept, strict=True))
    best = min(
        sum(
            float(values.sort().values[: 4 - n].sum())
            for values, n in zip(importance, ns, strict=True)
        )
        for ns in itertools.product(range(5), repeat=2)
        if sum(c * n for c, n in zip(cost, ns, strict=True)) <= 10.0
    )
    assert lost == pytest.approx(best, abs=1e-6)


def test_rearrangement_never_costs_more_together():
    gradient = torch.randn(200, 12, generator=GENERATOR)
    gradient[:, 6:] -= gradient[:, :6]
    kept = gradient.square().sum(0).argsort()[5:].sort().values
    cost = []
    for units in (kept, rearranged(gradient, kept)):
        cut = torch.ones(12, dtype=torch.bool)
        cut[units] = False
        cost.append(float(gradient[:, cut].sum(1).square().sum()))
        assert len(units) == len(kept)
    assert cost[1] < 0.9 * cost[0]


def test_moments_know_the_error_and_the_least_squares():
    x, y = torch.randn(50, 6, generator=GENERATOR), torch.randn(50, 3, generator=GENERATOR)
    moments = Moments()
    moments.add(x[:20], y[:20])
    moments.add(x[20:], y[20:])
    weight = ridge(moments.xx, moments.xy, 0.0).T
    expected = torch.linalg.lstsq(x, y).solution.T
    torch.testing.assert_close(weight.float(), expected, atol=1e-4, rtol=1e-4)
    error = (x @ expected.T - y).square().sum().item() / 50
    assert moments.error(weight, None) == pytest.approx(error, rel=1e-4)


def test_two_batches_are_enough_to_fit_and_to_check(bert):
    made = pruned(bert, rows(2), macs=0.6, round_to=4)
    assert any(one.scale is not None for one in made.program.metadata["masks"].cuts)


def test_weights_of_rows_count_like_repetitions():
    x, y = torch.randn(6, 4, generator=GENERATOR), torch.randn(6, 2, generator=GENERATOR)
    counts = torch.tensor([3, 1, 0, 2, 0, 0])
    weighted, repeated = Moments(), Moments()
    weighted.add(x, y, counts.float())
    repeated.add(x.repeat_interleave(counts, 0), y.repeat_interleave(counts, 0))
    for one, other in zip(vars(weighted).values(), vars(repeated).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_labels_are_used_and_needed(bert):
    made = pruned(bert, rows(labels=True), macs=0.6, labels=True, tune=False)
    assert made.program.metadata["masks"].share <= 0.6
    for calibration in (rows(), rows(labels=True) + rows()):
        with pytest.raises(RegraftError, match="needs a batch's 'labels'"):
            pruned(bert, calibration, macs=0.6, labels=True)
    with pytest.raises(RegraftError, match="reads no labels"):
        Prune(macs=0.6, labels=True, score="magnitude")


def test_bad_budgets_say_what_can_be_reached(llama, bert):
    for more in ({}, {"query_heads": True}):
        with pytest.raises(RegraftError, match=r"the least is 0\.\d") as error:
            pruned(llama, TEXT, macs=0.01, **more)
        least = float(str(error.value).split()[-1]) + 0.01
        assert pruned(llama, TEXT, macs=least, tune=False, **more).program.metadata["masks"]
    nothing = pruned(bert, rows(), macs=1e-6, tune=False).program
    assert not any(len(one.kept) for one in nothing.metadata["masks"].cuts)
    assert nothing(*nothing.examples)[0].isfinite().all()
    with pytest.raises(RegraftError, match="needs a budget"):
        pruned(bert, rows())
    with pytest.raises(RegraftError, match="no share between 0 and 1"):
        Prune(macs=1.5)
    with pytest.raises(RegraftError, match="one of macs, latency and masks"):
        Prune(macs=0.5, latency=0.5)


def test_calibration_must_fit(bert):
    with pytest.raises(RegraftError, match="needs calibration="):
        pruned(bert, None, macs=0.6)
    with pytest.raises(RegraftError, match="lacks the input input_ids"):
        pruned(bert, [{"pixels": torch.zeros(1, 3)}], macs=0.6)


def test_a_model_of_one_shared_layer_is_left_whole():
    sizes = {key: n for key, n in SMALL.items() if "key" not in key}
    config = AutoConfig.for_model("albert", **sizes, embedding_size=64)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with pytest.raises(RegraftError, match="matched nothing.*is shared with.*weights of its own"):
        pruned(model, rows(), macs=0.6)


def test_transposed_weights_that_layers_share_are_left_whole():
    model = tiny("gpt2", n_embd=64, n_layer=2, n_head=4, n_inner=128)
    first, second = model.transformer.h
    second.mlp.c_proj.weight, second.attn.c_attn.weight = (
        first.mlp.c_proj.weight,
        first.attn.c_attn.weight,
    )
    with pytest.raises(RegraftError, match="matched nothing.*is shared with"):
        pruned(model, TEXT, macs=0.8)


def test_shared_weights_are_never_cut(bert):
    layers = bert.bert.encoder.layer
    own = layers[1].output.dense.weight
    layers[1].output.dense.weight = layers[0].output.dense.weight
    try:
        made = pruned(bert, rows(), macs=0.8, tune=False)
    finally:
        layers[1].output.dense.weight = own
    skipped = made.report.rows[-1].skipped
    assert sum("is shared with" in why for _, why in skipped) == 2
    assert len(made.program.metadata["masks"].cuts) == 2


def test_a_model_without_units_is_an_error():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    with pytest.raises(RegraftError, match="Prune matched nothing"):
        regraft.compile(
            module, [Prune(macs=0.5)], example_inputs=(torch.zeros(2, 4),),
            calibration=[torch.zeros(2, 4)],
        )  # fmt: skip


@pytest.mark.parametrize(
    "drop",
    [
        lambda x: F.dropout(x, 0.5, True),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    ],
    ids=["dropout", "attention", "bernoulli"],
)
def test_dropout_left_on_is_an_error(drop):
    class Drops(torch.nn.Module):
        def forward(self, x):
            return drop(x)

    x = torch.zeros(2, 2, 4, 4)
    with pytest.raises(RegraftError, match="drops at random"):
        regraft.compile(
            Drops(), [Prune(macs=0.5)], example_inputs=(x,), target="reference", calibration=[x]
        )


def test_a_model_in_training_mode_is_pruned_without_its_dropout(bert):
    calibration = rows()
    expected = pruned(bert, calibration, macs=0.6, tune=False).program
    try:
        found = pruned(bert.train(), calibration, macs=0.6, tune=False).program
        assert bert.training
    finally:
        bert.eval()
    assert torch.equal(found(*expected.examples)[0], expected(*expected.examples)[0])


def too_few(notices):
    return [notice for notice in notices if "too few samples" in notice]


@pytest.mark.parametrize("count", [2, 6])
def test_too_few_samples_warn_once_whatever_they_are_too_few_for(bert, notices, count):
    made = pruned(bert, rows(count), macs=0.7, method="reconstruct", round_to=4)
    assert len(too_few(notices)) == 1
    rank = f"Fisher information of rank {4 * count} for"
    assert any(rank in why for _, why in made.report.rows[-1].skipped)


@pytest.mark.parametrize("count", [2, 32])
def test_fewer_rows_than_what_is_cut_warn_with_the_rank(bert, notices, count):
    made = pruned(bert, rows(count), macs=0.7, tune=False, round_to=4)
    cut = max(128 - len(one.kept) for one in made.program.metadata["masks"].cuts[1::2])
    if count == 2:
        assert too_few(notices)[0].endswith(f"Fisher information of rank 8 for {cut} cut")
    else:
        assert cut <= 4 * count and not too_few(notices)


def test_query_groups_stay_whole():
    made = pruned(tiny("llama", num_key_value_heads=4), TEXT, macs=0.5, tune=False)
    for spec in made.program.inputs:
        if spec.role == "cache":
            assert 1 <= spec.shape[1] <= 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", [{"method": "reconstruct"}, {}, {"score": "fluctuation"}])
def test_models_on_a_gpu_are_pruned_there(bert, settings, tmp_path):
    try:
        calibration = rows()
        dense = pruned(bert, calibration, macs=0.6, round_to=4, **settings).program
        inputs, expected = dense.examples, dense(*dense.examples)[0]
        made = pruned(bert.cuda(), calibration, macs=0.6, round_to=4, **settings).program
        regraft.save_masks(made, tmp_path / "m")
        again = pruned(bert, None, masks=str(tmp_path / "m")).program
        outputs = [p(*(x.cuda() for x in inputs))[0] for p in (made, again)]
    finally:
        bert.cpu()
    assert torch.equal(*outputs)
    assert all(x.is_cuda for x in outputs)
    torch.testing.assert_close(outputs[0].cpu(), expected, atol=1e-3, rtol=0)


def test_layers_that_stay_alike_are_outlined_after_pruning(tmp_path):
    llama = tiny("llama", num_hidden_layers=4)
    masks = pruned(llama, TEXT, macs=0.6, tune=False, round_to=4).program.metadata["masks"]
    alike = replace(masks, cuts=masks.cuts[:2] * (len(masks.cuts) // 2))
    alike.save(tmp_path / "m")
    made = regraft.compile(llama, [Prune(masks=str(tmp_path / "m"))])
    plain = regraft.compile(llama, [Prune(masks=str(tmp_path / "m"))], target="reference")
    assert {row.name: row.matches for row in made.report.rows}["OutlineLayers"] > 0
    torch.testing.assert_close(made(TEXT[0]).logits, plain(TEXT[0]).logits, atol=1e-5, rtol=1e-5)
