"""Blocks of every kind: what is cut out of a graph equals what is masked in it."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
)

import regraft
from regraft.passes import KVQuant, Prune
from regraft.passes.pruning.blocks import count_macs
from regraft.passes.pruning.masks import Masks
from regraft.passes.pruning.ranks import Ranks
from regraft.passes.pruning.slicing import Cut
from regraft.passes.recorder import Runner
from regraft.program import RegraftError
from tests.conftest import SMALL, tiny
from tests.passes.masking import dense_blocks, masked
from tests.runtime.test_seq2seq import BART

IDS = torch.randint(3, 256, (3, 12), generator=torch.Generator().manual_seed(2))
TEXT = [torch.randint(3, 256, (1, 48), generator=torch.Generator().manual_seed(i)) for i in (3, 4)]
GPT2 = dict(n_embd=64, n_layer=2, n_head=4, n_inner=128)
SPEECH = BART | dict(num_mel_bins=8, max_source_positions=20, max_target_positions=40)


def bert():
    torch.manual_seed(0)
    sizes = {key: n for key, n in SMALL.items() if "key" not in key}
    config = AutoConfig.for_model("bert", **sizes, num_labels=3, initializer_range=0.2)
    return AutoModelForSequenceClassification.from_config(config).eval()


def whisper():
    torch.manual_seed(0)
    config = AutoConfig.for_model("whisper", **SPEECH)
    return AutoModelForSpeechSeq2Seq.from_config(config).eval()


ENCODERS = {"bert": bert, "whisper encoder": lambda: whisper().get_encoder()}
DECODERS = {
    "llama": lambda: tiny("llama", initializer_range=0.2),
    "llama, query heads": lambda: tiny("llama", initializer_range=0.2),
    "llama, no sharing": lambda: tiny("llama", num_key_value_heads=4, initializer_range=0.2),
    "qwen3, query heads": lambda: tiny("qwen3", initializer_range=0.2),
    "gemma, one key head": lambda: tiny("gemma", num_key_value_heads=1, initializer_range=0.2),
    "gpt2": lambda: tiny("gpt2", **GPT2, initializer_range=0.2),
}


def captured(model):
    """Its program; calibration keeps it from being one of an earlier test's."""
    return regraft.compile(model, calibration=TEXT, target="reference").program


def some_masks(blocks):
    """Other units of each block, scaled; of the first of a kind that can go, none."""
    generator = torch.Generator().manual_seed(5)
    cuts, gone = [], set()
    for turn, block in enumerate(blocks):
        ranks = Ranks(block, torch.rand(block.units, generator=generator))
        count = max(1, ranks.block.units * (1 + turn % 3) // 4)
        if not block.least and block.kind not in gone and turn:
            gone.add(block.kind)
            count = 0
        kept = ranks.units(torch.arange(count))
        scale = 0.5 + torch.rand(len(kept) * block.parts, generator=generator)
        cuts.append(Cut(kept, scale))
    return Masks.of(blocks, cuts, 12)


def both(model, folder, query_heads=False):
    """The sliced model, a runner of the masked one, and the masks."""
    dense = captured(model)
    blocks, skipped = dense_blocks(dense, query_heads)
    assert len(blocks) == 4 and not skipped
    masks = some_masks(blocks)
    masks.save(folder / "masks.safetensors")
    pruning = Prune(masks=str(folder / "masks.safetensors"))
    made = regraft.compile(model, [pruning], target="reference")
    return made, masked(dense, blocks, masks), masks


@pytest.mark.parametrize("name", ENCODERS)
def test_masked_encoders_equal_sliced_ones(name, tmp_path):
    made, runner, masks = both(ENCODERS[name](), tmp_path)
    assert {len(one.kept) for one in masks.cuts} >= {0, 1}
    examples = made.program.examples
    with torch.no_grad():
        expected = runner.run(*examples)[0]
    torch.testing.assert_close(made.program(*examples)[0], expected, atol=1e-5, rtol=1e-5)
    attention = torch.ops.regraft.attention.default
    nodes = made.program.graph.find_nodes(op="call_function", target=attention)
    assert [n.args[0].meta["val"].shape[1] for n in nodes] == [1]
    if name == "bert":  # its norms follow what was cut
        norm = torch.ops.aten.layer_norm.default
        assert len(made.program.graph.find_nodes(op="call_function", target=norm)) == 5


@pytest.mark.parametrize("name", DECODERS)
def test_masked_decoders_equal_sliced_ones_and_generate(name, tmp_path):
    made, runner, masks = both(DECODERS[name](), tmp_path, "query heads" in name)
    kinds = {layout.kind for layout in masks.layouts}
    within = "query heads" in name or "one key head" in name
    assert kinds == {"query heads" if within else "heads", "filters"}
    with torch.no_grad():
        torch.testing.assert_close(made(IDS).logits, runner.logits(IDS), atol=1e-5, rtol=1e-5)
        dense = Runner(runner.program, {}).logits(IDS)
        assert (made(IDS).logits - dense).abs().max() > 1e-2
    caches = [spec.shape[1] for spec in made.program.inputs if spec.role == "cache"]
    kept = [len(one.kept) for one in masks.cuts[::2] for _ in range(2)]
    assert caches == ([1 if "one" in name else 2] * 4 if within else kept)
    counted = [count_macs(program, 12) for program in (made.program, runner.program)]
    assert counted[0] / counted[1] == pytest.approx(masks.share)
    ids = IDS[:1, :8]
    found = made.generate(ids, max_new_tokens=6, do_sample=False, min_new_tokens=6)
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, runner.logits(ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize("name", ["gpt2", "llama, query heads"])
def test_searched_units_keep_the_budget(name):
    within = "query heads" in name
    model = DECODERS[name]()
    pruning = Prune(macs=0.65, round_to=8, query_heads=within, method="reconstruct")
    made = regraft.compile(model, [pruning], calibration=TEXT, target="reference")
    masks = made.program.metadata["masks"]
    assert 0.6 < masks.share <= 0.65
    if within:
        for layout, one in zip(masks.layouts, masks.cuts, strict=True):
            if layout.kind == "query heads":
                assert len(torch.bincount(one.kept // 2, minlength=2).unique()) == 1


def test_unbalanced_query_heads_are_refused(tmp_path):
    model = DECODERS["llama, query heads"]()
    program = captured(model)
    blocks, _ = dense_blocks(program, True)
    cuts = [Cut(torch.tensor([0, 1, 2])), *(Cut(torch.arange(b.units)) for b in blocks[1:])]
    Masks.of(blocks, cuts, 12).save(tmp_path / "masks.safetensors")
    with pytest.raises(RegraftError, match="masks do not fit"):
        regraft.compile(model, [Prune(masks=str(tmp_path / "masks.safetensors"))])


def test_heads_that_are_normalised_together_are_left_whole():
    program = captured(tiny("olmo2"))
    blocks, skipped = dense_blocks(program, False)
    assert not [block for block in blocks if block.attention is not None]
    assert all("normalised over all heads" in why for _, why in skipped) and len(skipped) == 2


def test_a_sliced_encoder_runs_on_onnxruntime(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    made, _, _ = both(ENCODERS["bert"](), tmp_path)
    made.export_onnx(tmp_path / "out")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    mask = torch.ones_like(IDS)
    mask[0, 7:] = 0
    known = {"input_ids": IDS, "attention_mask": mask, "token_type_ids": torch.zeros_like(IDS)}
    given = {i.name: known[i.name].numpy() for i in session.get_inputs()}
    expected = made(IDS, mask).logits.numpy()
    np.testing.assert_allclose(session.run(None, given)[0], expected, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama, query heads"])
def test_a_sliced_decoder_saves_exports_and_takes_a_quantised_cache(name, tmp_path):
    pytest.importorskip("onnxruntime")
    made, _, _ = both(DECODERS[name](), tmp_path, "query heads" in name)
    ids = IDS[:, :6]
    made.save(tmp_path / "saved")
    torch.testing.assert_close(regraft.load(tmp_path / "saved")(ids).logits, made(ids).logits)
    made.export_onnx(tmp_path / "onnx")
    exported = regraft.load(tmp_path / "onnx")(ids).logits
    torch.testing.assert_close(exported, made(ids).logits, atol=1e-4, rtol=1e-4)
    pruning = Prune(masks=str(tmp_path / "masks.safetensors"))
    cached = regraft.compile(
        DECODERS[name](), [pruning, KVQuant(bits=8, tail=16, group=32)], target="reference"
    )
    found = cached.generate(IDS, max_new_tokens=40, do_sample=False)
    assert found.shape[1] > 12 and {layer.format for layer in cached.program.cache.layers} == {
        "kvquant"
    }


def test_the_encoder_of_a_speech_model_is_cut_and_its_decoder_left():
    model = whisper()
    generator = torch.Generator().manual_seed(1)
    features = [{"input_features": torch.randn(2, 8, 40, generator=generator)} for _ in range(8)]
    pruning = Prune(macs=0.7, round_to=8)
    made = regraft.compile(model, [pruning], calibration=features, target="reference")
    row = {row.name: row for row in made.report.rows}
    assert row["Prune (encoder)"].matches == 4 and not row["Prune (decoder)"].matches
    ((_, why),) = row["Prune (decoder)"].skipped
    assert "calibration" in why
    found = made.generate(**features[0], max_new_tokens=6, do_sample=False)
    hidden = made.encoder(**features[0])
    assert torch.equal(
        found, model.generate(encoder_outputs=hidden, max_new_tokens=6, do_sample=False)
    )
    with torch.no_grad():
        dense = model.get_encoder()(**features[0]).last_hidden_state
    assert (hidden.last_hidden_state - dense).abs().max() > 1e-2
