import json
import resource

import onnx
import pytest
import torch

import regraft
from regraft import RegraftError
from tests.conftest import tiny

onnxruntime = pytest.importorskip("onnxruntime")
MODELS = ["llama", "gemma2", "phi3", "mistral", "qwen2", "gpt2", "gpt_neox", "opt", "bloom"]


@pytest.fixture(scope="module")
def compiled(llama):
    return regraft.compile(llama, target="reference")


@pytest.fixture(scope="module")
def folder(compiled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "llama"
    compiled.export_onnx(folder)
    return folder


@pytest.mark.parametrize("model_type", MODELS)
def test_every_export_is_checked_and_close(model_type, tmp_path):
    compiled = regraft.compile(tiny(model_type), target="reference")
    written = compiled.export_onnx(tmp_path / "out")
    assert set(written.errors) == {"prefill", "decode", "verify", "padded batch"}
    assert max(written.errors.values()) < 1e-4


@pytest.mark.parametrize("opset", [18, 21, 23])
@pytest.mark.parametrize("functions", [True, False])
def test_opsets_and_functions(compiled, tmp_path, opset, functions):
    compiled.export_onnx(tmp_path / "out", opset=opset, functions=functions)
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert model.opset_import[0].version == opset
    names = {function.name for function in model.functions}
    assert names == ({"CausalMask", "CachedAttention"} if functions else set())


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mistral", "gpt2"])
def test_fused_operators_compute_the_same(model_type, tmp_path):
    compiled = regraft.compile(tiny(model_type), target="reference")
    written = compiled.export_onnx(tmp_path / "out", contrib=True)
    assert written.fused == {"GroupQueryAttention": 2}
    assert "2 GroupQueryAttention" in str(written)
    assert max(written.errors.values()) < 1e-4


def test_names_dims_and_files_are_those_of_optimum_and_genai(folder):
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    batch = "batch_size"
    assert shapes["input_ids"] == shapes["position_ids"] == [batch, "sequence_length"]
    assert shapes["attention_mask"] == [batch, "total_sequence_length"]
    assert shapes["past_key_values.1.key"] == [batch, 2, "past_sequence_length", 16]
    assert shapes["present.0.value"] == [batch, 2, "total_sequence_length", 16]
    assert shapes["logits"][:2] == [batch, "sequence_length"]
    assert "logits_to_keep" not in shapes
    settings = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    assert settings["inputs"]["past_key_names"] == "past_key_values.%d.key"
    assert settings["num_key_value_heads"] == 2 and settings["head_size"] == 16
    assert (folder / "config.json").is_file() and (folder / "generation_config.json").is_file()
    passes = json.loads({p.key: p.value for p in model.metadata_props}["regraft_passes"])
    assert {"pass": "RaiseAttention", "matches": 2} in passes


def test_weights_are_stored_once(folder, llama):
    size = sum(p.numel() * 4 for p in llama.parameters())
    data = (folder / "model.onnx.data").stat().st_size
    assert data < 1.02 * size + 2**16


def test_nodes_are_named_by_module(folder):
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    names = {node.name for node in model.graph.node}
    assert "/model/layers/0/self_attn/o_proj/MatMul" in names


def test_a_loaded_export_generates_alike(folder, llama, batch):
    exported = regraft.load(folder)
    for settings in ({}, {"num_beams": 3}):
        made = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **settings}
        assert torch.equal(llama.generate(**batch, **made), exported.generate(**batch, **made))


def genai_follows(folder, model):
    """Whether onnxruntime-genai continues a prompt as the model does."""
    genai = pytest.importorskip("onnxruntime_genai")
    prompt = torch.randint(3, 256, (1, 9), generator=torch.Generator().manual_seed(1))
    made = genai.Model(str(folder))
    settings = genai.GeneratorParams(made)
    settings.set_search_options(max_length=25, do_sample=False)
    generator = genai.Generator(made, settings)
    generator.append_tokens(prompt[0].tolist())
    while not generator.is_done():
        generator.generate_next_token()
    want = model.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=0)
    sequence = list(generator.get_sequence(0))
    return len(sequence) > 9 and sequence == want[0].tolist()[: len(sequence)]


def test_onnxruntime_genai_generates_alike(folder, llama):
    assert genai_follows(folder, llama)


def test_onnx_is_a_target(llama, batch):
    exported = regraft.compile(llama, target="onnx")
    want = llama(**batch).logits[:, -1]
    assert (exported(**batch).logits[:, -1] - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4},
        {"bits": {"key": 3, "value": 2}, "outliers": 0.03},
        {"bits": 8, "outliers": 0.0},
        {"bits": 2, "tail": 16},
        {"bits": 3, "codebook": "rotated"},
    ],
    ids=str,
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_quantised_exports_follow_the_compiled_program(llama, tmp_path, settings, calibrated):
    texts = torch.randint(3, 256, (2, 256)).split(1) if calibrated else None
    quantized = regraft.KVQuant(**settings)
    compiled = regraft.compile(llama, [quantized], calibration=texts, target="reference")
    compiled.export_onnx(tmp_path / "out")
    exported = regraft.load(tmp_path / "out")
    ids = torch.randint(3, 256, (2, 300))
    caches = exported.new_cache(), compiled.new_cache()
    start = 0
    for size in (120, 5, 1, 60, 1, 1, 80, 3):
        part = ids[:, start : start + size]
        start += size
        got, want = (
            model(part, past_key_values=cache).logits
            for model, cache in zip((exported, compiled), caches, strict=True)
        )
        assert (got - want).abs().max() < 2e-3 * want.abs().max()
    assert caches[0].state.floor > 100
    with pytest.raises(ValueError, match="quantized"):
        caches[0].crop(20)
    caches[0].crop(start - 2)
    assert caches[0].state.length == start - 2


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gemma2"])
def test_exports_of_rotated_codes_generate_alike(model_type, tmp_path):
    quantized = regraft.KVQuant(bits=3, codebook="rotated")
    compiled = regraft.compile(tiny(model_type), [quantized], target="reference")
    compiled.export_onnx(tmp_path / "out")
    exported = regraft.load(tmp_path / "out")
    ids = torch.randint(3, 256, (2, 150), generator=torch.Generator().manual_seed(1))
    made = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(exported.generate(ids, **made), compiled.generate(ids, **made))


@pytest.mark.parametrize("codebook", ["lloyd_max", "rotated"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_sinks_of_padded_rows_are_their_own_first_tokens(model_type, codebook, tmp_path):
    quantized = regraft.KVQuant(bits=2, codebook=codebook)
    compiled = regraft.compile(tiny(model_type), [quantized], target="reference")
    compiled.export_onnx(tmp_path / "out")
    exported = regraft.load(tmp_path / "out")
    ids = torch.randint(3, 256, (3, 240), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :37] = mask[2, :90] = 0
    caches, stop = (exported.new_cache(), compiled.new_cache()), 0
    for size in (150, 1, 5, 1, 70, 1):
        part = slice(stop, stop := stop + size)
        got, want = (
            model(ids[:, part], mask[:, :stop], past_key_values=cache).logits
            for model, cache in zip((exported, compiled), caches, strict=True)
        )
        seen = mask[:, part].bool()
        assert (got - want)[seen].abs().max() < 2e-3 * want[seen].abs().max()
    assert caches[0].state.floor == max(layer.floor for layer in caches[1].state.layers)


def test_bad_requests(compiled, folder, tmp_path):
    with pytest.raises(RegraftError, match="exists: name another folder"):
        compiled.export_onnx(folder)
    with pytest.raises(RegraftError, match="opset 12"):
        compiled.export_onnx(tmp_path / "out", opset=12)
    (tmp_path / "file").write_text("")
    with pytest.raises(RegraftError, match="file"):
        compiled.export_onnx(tmp_path / "file", force=True)
    with pytest.raises(RegraftError, match="cannot be written"):
        compiled.export_onnx("/proc/regraft/out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_export_is_refused(folder, tmp_path):
    for name in ("config.json", "model.onnx"):
        (tmp_path / name).write_bytes((folder / name).read_bytes()[:1000])
    with pytest.raises(RegraftError):
        regraft.load(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(RegraftError, match="onnxruntime refuses model.onnx"):
        regraft.load(tmp_path)


def test_a_wrong_export_is_not_written(compiled, tmp_path, monkeypatch):
    from regraft.frontends.export.builder import handlers

    right = handlers["aten.rsqrt"]
    monkeypatch.setitem(handlers, "aten.rsqrt", lambda b, x: b.op("Mul", right(b, x), b.to(1.5)))
    with pytest.raises(RegraftError, match="differs from the compiled program"):
        compiled.export_onnx(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_operator_without_a_form_is_named(compiled, tmp_path, monkeypatch):
    from regraft.frontends.export.builder import handlers

    monkeypatch.delitem(handlers, "aten.silu")
    with pytest.raises(RegraftError, match=r"layers.0.mlp.act_fn .*: aten.silu has no ONNX form"):
        compiled.export_onnx(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(compiled, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(RegraftError, match="cannot be written to"):
            compiled.export_onnx(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_force_replaces_an_export_and_its_failure_keeps_it(compiled, tmp_path, monkeypatch):
    from regraft.frontends.export.builder import handlers

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with monkeypatch.context() as broken:
        broken.delitem(handlers, "aten.silu")
        with pytest.raises(RegraftError, match="no ONNX form"):
            compiled.export_onnx(tmp_path / "out", force=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    compiled.export_onnx(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "model.onnx").is_file() and not (tmp_path / "out" / "mine").exists()


def test_dense_and_quantised_layers_in_one_model(llama, tmp_path):
    quantized = regraft.KVQuant(bits=4, layers={0: {"key": 16, "value": 16}})
    compiled = regraft.compile(llama, [quantized], target="reference")
    assert [layer.format for layer in compiled.program.cache.layers] == ["dense", "kvquant"]
    compiled.export_onnx(tmp_path / "out")
    exported = regraft.load(tmp_path / "out")
    ids = torch.randint(3, 256, (2, 150), generator=torch.Generator().manual_seed(1))
    made = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(exported.generate(ids, **made), compiled.generate(ids, **made))


def test_the_inverse_error_function_is_precise(tmp_path):
    class Inverse(torch.nn.Module):
        def forward(self, x):
            return torch.erfinv(x)

    x = torch.cat([torch.linspace(-1, 1, 4001), 1 - torch.logspace(-7, -2, 50)])
    compiled = regraft.compile(Inverse(), example_inputs=(x,), target="reference")
    compiled.export_onnx(tmp_path / "out")
    got, want = regraft.load(tmp_path / "out")(x), torch.erfinv(x)
    assert torch.equal(got.isinf(), want.isinf())
    torch.testing.assert_close(got, want, atol=1e-6, rtol=2e-6)


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("unit", [True, False])
def test_triangular_systems(upper, left, unit, tmp_path):
    class Solve(torch.nn.Module):
        def forward(self, a, y):
            return torch.linalg.solve_triangular(a, y, upper=upper, left=left, unitriangular=unit)

    a = torch.randn(2, 6, 6) / 4 + 2 * torch.eye(6)
    given = (a, torch.randn(2, 6, 3) if left else torch.randn(2, 3, 6))
    compiled = regraft.compile(Solve(), example_inputs=given, target="reference")
    assert max(compiled.export_onnx(tmp_path / "out").errors.values()) < 1e-5


@pytest.mark.parametrize(
    "model_type", ["llama4_text", "deepseek_v2", "mixtral", "gpt_oss", "jetmoe"]
)
def test_complex_rotations_and_changes_in_place(model_type):
    from regraft.benchmarks.onnx_models import export_one

    outcome = export_one(model_type)
    assert outcome["error"] is not None and outcome["error"] < 1e-4, outcome["reason"]
