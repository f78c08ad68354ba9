import pytest
import torch

import regraft
from regraft import RegraftError
from tests.conftest import tiny


def attention(compiled):
    target = torch.ops.regraft.cached_attention.default
    return compiled.program.graph.find_nodes(op="call_function", target=target)


@pytest.fixture(scope="module")
def folders(llama, tmp_path_factory):
    """The same model with its operators as functions, and in standard operators alone."""
    folder = tmp_path_factory.mktemp("exports")
    compiled = regraft.compile(llama, target="reference")
    for functions in (True, False):
        compiled.export_onnx(folder / str(functions), functions=functions)
    return folder


@pytest.mark.parametrize("functions", [True, False])
def test_captured_exported_imported_is_captured(llama, folders, batch, functions):
    compiled = regraft.compile(folders / str(functions), target="reference")
    assert len(attention(compiled)) == len(compiled.program.cache.layers) == 2
    made = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    for settings in ({}, {"num_beams": 3}):
        want = llama.generate(**batch, **made, **settings)
        assert torch.equal(compiled.generate(**batch, **made, **settings), want)


def test_functions_keep_their_rotation(folders):
    compiled = regraft.compile(folders / "True", target="reference")
    assert all(node.args[6] is not None for node in attention(compiled))


@pytest.mark.parametrize("model_type", ["gemma2", "mistral", "gpt2", "phi3", "opt"])
def test_other_models_come_back(model_type, tmp_path):
    model = tiny(model_type)
    captured = regraft.compile(model, target="reference")
    captured.export_onnx(tmp_path / "out")
    imported = regraft.compile(tmp_path / "out", target="reference")
    ids = torch.randint(3, 200, (2, 12))
    caches = captured.new_cache(), imported.new_cache()
    for part in (ids[:, :9], ids[:, 9:10], ids[:, 10:]):
        want, got = (
            one(part, past_key_values=cache).logits
            for one, cache in zip((captured, imported), caches, strict=True)
        )
        assert (want - got).abs().max() < 1e-5 * want.abs().max()


def test_passes_apply_to_what_was_imported(llama, folders):
    compiled = regraft.compile(folders / "True", [regraft.KVQuant(bits=8)], target="reference")
    ids = torch.randint(3, 256, (1, 200))
    cache = compiled.new_cache()
    for part in (ids[:, :150], ids[:, 150:199], ids[:, 199:]):
        got = compiled(part, past_key_values=cache).logits[:, -1]
    want = llama(ids).logits[:, -1]
    assert cache.state.layers[0].blocks
    assert (want - got).abs().max() < 0.02 * want.abs().max()


def test_folders_that_are_no_language_model(folders, llama, tmp_path):
    with pytest.raises(RegraftError, match="holds no model.onnx"):
        regraft.compile(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(RegraftError, match="no config.json"):
        regraft.compile(tmp_path)
    coded = regraft.compile(llama, [regraft.KVQuant(bits=4)], target="reference")
    coded.export_onnx(tmp_path / "coded")
    with pytest.raises(RegraftError, match="none of a language model with a dense cache"):
        regraft.compile(tmp_path / "coded", target="reference")


def test_attention_in_two_parts_stays_causal():
    from regraft.benchmarks.onnx_models import export_one

    outcome = export_one("diffllama")
    assert outcome["round_trip"] is not None and outcome["round_trip"] < 1e-5, outcome["reason"]


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_quantised_export_imports_as_a_graph(llama, tmp_path, calibrated):
    texts = torch.randint(3, 256, (2, 256)).split(1) if calibrated else None
    coded = regraft.compile(llama, [regraft.KVQuant(bits=3)], calibration=texts, target="reference")
    coded.export_onnx(tmp_path / "out")
    runtime = regraft.load(tmp_path / "out")
    imported = regraft.compile(tmp_path / "out" / "model.onnx", target="reference")
    ids, cache = torch.randint(3, 256, (1, 125)), runtime.new_cache()
    runtime(ids[:, :120], past_key_values=cache)
    past = {name: torch.from_numpy(x.numpy().copy()) for name, x in cache.state.past.items()}
    want = runtime(ids[:, 120:], past_key_values=cache).logits
    logits, *present = imported(
        {
            "input_ids": ids[:, 120:],
            "attention_mask": torch.ones(1, 125, dtype=torch.long),
            "position_ids": torch.arange(120, 125)[None],
            **past,
        }
    )
    assert (logits - want).abs().max() < 1e-5 * want.abs().max()
    assert len(present) == len(past)
