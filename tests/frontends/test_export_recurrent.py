import onnx
import pytest
import torch

import regraft
from regraft import RegraftError
from tests.conftest import tiny
from tests.frontends.test_export import genai_follows
from tests.runtime.test_recurrent import MODELS

pytest.importorskip("onnxruntime")
SLOW = pytest.param("qwen3_next", marks=pytest.mark.slow)
PIECES = {"qwen3_next": (2, 61), "lfm2": (2, None)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A compiled model, what its export wrote and that loaded, by type; each is made once."""
    made = {}

    def get(name):
        if name not in made:
            model = tiny(name, **MODELS[name])
            compiled = regraft.compile(model, target="reference")
            written = compiled.export_onnx(tmp_path_factory.mktemp(name) / "out")
            made[name] = compiled, written, regraft.load(written.folder), model
        return made[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_every_export_is_checked_and_close(name, exported):
    compiled, written, _, _ = exported(name)
    wanted = {"prefill", "decode", "verify", "padded batch"}
    prefill = compiled.program.prefill
    assert set(written.errors) - wanted == (
        {"pieces"} if prefill is not None and prefill.tokens[1] else set()
    )
    assert max(written.errors.values()) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_export_generates_as_the_model(name, exported, batch):
    compiled, _, loaded, _ = exported(name)
    for beams in (1, 3):
        made = dict(max_new_tokens=6, do_sample=False, num_beams=beams, pad_token_id=0)
        assert torch.equal(loaded.generate(**batch, **made), compiled.generate(**batch, **made))


def test_states_are_named_as_by_onnxruntime_genai(exported):
    _, written, _, _ = exported("qwen3_next")
    graph = onnx.load(written.folder / "model.onnx", load_external_data=False).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["past_key_values.0.conv_state"] == shapes["present.0.conv_state"]
    assert shapes["past_key_values.0.recurrent_state"] == ["batch_size", 4, 16, 16]
    assert shapes["past_key_values.1.key"] == ["batch_size", 2, "past_sequence_length", 16]


def test_onnxruntime_genai_runs_a_hybrid(exported):
    _, written, _, model = exported("lfm2")
    assert genai_follows(written.folder, model)


def test_a_prefill_for_any_number_is_the_whole_graph(exported):
    operators = {}
    for name in ("lfm2", "qwen3_next", "mamba"):
        graph = onnx.load(exported(name)[1].folder / "model.onnx", load_external_data=False).graph
        operators[name] = {node.op_type for node in graph.node}
    assert "Loop" not in operators["lfm2"]
    assert "Loop" in operators["qwen3_next"] and "Loop" in operators["mamba"]


def test_the_last_steps_alone_can_be_taken_back(exported, batch):
    compiled, _, loaded, _ = exported("lfm2")
    ids = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    caches = loaded.new_cache(), compiled.new_cache()
    got = []
    for model, cache in zip((loaded, compiled), caches, strict=True):
        model(ids[:, :6], past_key_values=cache)
        model(ids[:, 6:9], past_key_values=cache)
        cache.crop(-2)
        assert cache.get_seq_length() == 7 and not cache.is_croppable
        with pytest.raises(ValueError, match="recurrent states"):
            cache.crop(3)
        cache.reorder_cache(torch.tensor([1, 0]))
        got.append(model(ids[:, 7:], past_key_values=cache).logits)
        cache.reset()
        assert cache.get_seq_length() == 0
    assert (got[0] - got[1]).abs().max() < 1e-5 * got[1].abs().max()


@pytest.mark.parametrize("name", ["lfm2", "mamba", "rwkv", SLOW])
def test_imported_again_it_is_the_program_that_it_was(name, exported):
    from regraft.benchmarks.onnx_models import difference

    compiled, written, _, _ = exported(name)
    again = regraft.compile(written.folder, target="reference")
    assert difference(compiled, again) < 1e-5
    assert again.program.cache.states == compiled.program.cache.states
    prefill = again.program.prefill
    assert (prefill and prefill.tokens) == PIECES.get(name)


@pytest.mark.parametrize("name", ["jamba", SLOW])
def test_quantised_layers_of_hybrids(name, exported, tmp_path):
    model = exported(name)[3]
    compiled = regraft.compile(model, [regraft.KVQuant(bits=4)], target="reference")
    compiled.export_onnx(tmp_path / "out")
    loaded = regraft.load(tmp_path / "out")
    ids = torch.randint(3, 256, (2, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    caches, stop = (loaded.new_cache(), compiled.new_cache()), 0
    for size in (130, 1, 5, 1):
        part = slice(stop, stop := stop + size)
        got, want = (
            model(ids[:, part], mask[:, :stop], past_key_values=cache).logits
            for model, cache in zip((loaded, compiled), caches, strict=True)
        )
        seen = mask[:, part].bool()
        assert (got - want)[seen].abs().max() < 2e-3 * want[seen].abs().max()
    assert caches[0].state.floor > 64


@pytest.mark.parametrize("settings", [dict(opset=18), dict(opset=23, functions=False)], ids=str)
def test_opsets_and_functions(settings, exported, tmp_path):
    compiled = exported("qwen3_next")[0]
    assert max(compiled.export_onnx(tmp_path / "out", **settings).errors.values()) < 1e-5


@pytest.mark.slow
def test_the_longest_context_is_kept(tmp_path):
    from regraft.benchmarks.small_models import small_model

    compiled = regraft.compile(small_model("dots3_note_text"), target="reference")
    compiled.export_onnx(tmp_path / "out")
    with pytest.raises(RegraftError, match="beyond the 15"):
        regraft.load(tmp_path / "out")(torch.ones(1, 16, dtype=torch.long))
