import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

import regraft
from regraft.passes import KVQuant, Prune
from regraft.passes.pruning.blocks import count_macs, find
from regraft.passes.pruning.masks import Masks
from regraft.passes.pruning.moments import Moments, ridge
from regraft.passes.pruning.search import rearranged, search
from regraft.passes.recorder import Runner
from regraft.program import RegraftError
from tests.conftest import SMALL, tiny

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


def masked(model, masks, inputs):
    """The dense program with the cuts applied as weights that read what is kept, nothing cut."""
    program = regraft.compile(model, target="reference").program
    from regraft.passes.fuse_linear import split_fused
    from regraft.passes.pruning.slicing import columns

    split_fused(program)
    edits = {}
    for block, one in zip(find(program)[0], masks.cuts, strict=True):
        weight, bias = one.reading(program, block)
        full = torch.zeros(weight.shape[0], block.units * block.width)
        full[:, columns(block, one.kept)] = weight
        edits[block.output] = lambda x, *_, full=full, bias=bias: (x, full, bias)
    with torch.no_grad():
        return Runner(program, edits).run(*inputs)


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
    expected = masked(model, masks, dense.examples[:3]) if kind == "bert" else None
    if expected is not None:
        found = made.program(*made.program.examples)
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
        assert (found[0] - dense(*dense.examples)[0]).abs().max() > 1e-4
    else:
        ids = TEXT[0]
        cuts = [len(one.kept) for one in masks.cuts]
        states = [s.shape[1] for s in made.program.inputs if s.name.endswith("key")]
        assert states == cuts[::2]
        runner = Runner(made.program, {})
        with torch.no_grad():
            torch.testing.assert_close(runner.logits(ids), made(ids).logits, atol=1e-5, rtol=1e-5)
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
    expected = masked(bert, nothing, again.program.examples)
    found = again.program(*again.program.examples)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
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


def test_weights_of_rows_count_like_repetitions():
    x, y = torch.randn(6, 4, generator=GENERATOR), torch.randn(6, 2, generator=GENERATOR)
    counts = torch.tensor([3, 1, 0, 2, 0, 0])
    weighted, repeated = Moments(), Moments()
    weighted.add(x, y, counts.float())
    repeated.add(x.repeat_interleave(counts, 0), y.repeat_interleave(counts, 0))
    for one, other in zip(vars(weighted).values(), vars(repeated).values(), strict=True):
        torch.testing.assert_close(one, other)


def test_labels_are_used_and_needed(bert):
    made = pruned(bert, rows(labels=True), macs=0.6, labels=True, tune=False)
    assert made.program.metadata["masks"].share <= 0.6
    with pytest.raises(RegraftError, match="needs a batch's 'labels'"):
        pruned(bert, rows(), macs=0.6, labels=True)


def test_bad_budgets_say_what_can_be_reached(llama, bert):
    with pytest.raises(RegraftError, match=r"the least is 0\.\d"):
        pruned(llama, TEXT, macs=0.01)
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


def test_dropout_left_on_is_an_error():
    class Drops(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.dropout(x, 0.5, True)

    with pytest.raises(RegraftError, match="drops at random"):
        regraft.compile(
            Drops(), [Prune(macs=0.5)], example_inputs=(torch.zeros(2, 4),), target="reference",
            calibration=[torch.zeros(2, 4)],
        )  # fmt: skip


def test_too_few_samples_warn_once_with_the_rank(bert, notices):
    pruned(bert, rows(2), macs=0.7, method="reconstruct", round_to=4)
    assert sum("too few samples" in notice for notice in notices) == 1


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
