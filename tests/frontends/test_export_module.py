import onnx
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, ViTConfig

import regraft
from regraft import RegraftError

pytest.importorskip("onnxruntime")
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


class Blocks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = torch.nn.Linear(8, 16)
        self.layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def forward(self, x):
        return self.layer(torch.nn.functional.gelu(self.enter(x)))


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=256, max_position_embeddings=64, **SMALL)
    return regraft.compile(AutoModel.from_config(config).eval(), target="reference")


def dims(path):
    graph = onnx.load(path / "model.onnx", load_external_data=False).graph
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def test_an_encoder_has_the_names_of_optimum(bert, tmp_path):
    written = bert.export_onnx(tmp_path / "out")
    assert set(written.errors) == {"examples", "other sizes"}
    assert max(written.errors.values()) < 1e-5 and "outputs" in str(written)
    shapes = dims(tmp_path / "out")
    rows = ["batch_size", "sequence_length"]
    assert shapes["input_ids"] == shapes["attention_mask"] == shapes["token_type_ids"] == rows
    assert shapes["last_hidden_state"] == [*rows, 64]
    assert (tmp_path / "out" / "config.json").is_file()
    loaded = regraft.load(tmp_path / "out")
    ids = torch.randint(3, 256, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    got, want = loaded(input_ids=ids, attention_mask=mask), bert(ids, mask)
    for name in ("last_hidden_state", "pooler_output"):
        assert (got[name] - want[name]).abs().max() < 1e-5
    assert torch.equal(loaded(ids)[0], loaded(ids, torch.ones_like(ids))[0])
    with pytest.raises(RegraftError, match="unknown input labels"):
        loaded(ids, labels=ids)


def test_an_encoder_with_a_head_gives_logits(tmp_path):
    config = BertConfig(vocab_size=256, max_position_embeddings=64, num_labels=3, **SMALL)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    regraft.compile(model, target="reference").export_onnx(tmp_path / "out", functions=False)
    assert dims(tmp_path / "out")["logits"] == ["batch_size", 3]


def test_a_vision_encoder(tmp_path):
    config = ViTConfig(image_size=32, patch_size=8, **SMALL)
    compiled = regraft.compile(AutoModel.from_config(config).eval(), target="reference")
    compiled.export_onnx(tmp_path / "out")
    assert dims(tmp_path / "out")["pixel_values"] == ["batch_size", 3, 32, 32]


def test_a_module_by_its_own_dynamic_sizes(tmp_path):
    module = Blocks().eval()
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    compiled = regraft.compile(
        module, example_inputs=(torch.randn(2, 5, 8),), dynamic_shapes=shapes, target="reference"
    )
    compiled.export_onnx(tmp_path / "out")
    assert dims(tmp_path / "out") == {
        "x": ["batch", "length", 8],
        "output": ["batch", "length", 16],
    }
    x = torch.randn(4, 9, 8)
    loaded = regraft.load(tmp_path / "out")
    with torch.no_grad():
        assert (loaded(x) - module(x)).abs().max() < 1e-5
    again = regraft.compile(str(tmp_path / "out" / "model.onnx"), target="reference")
    assert (again(x) - loaded(x)).abs().max() < 1e-5


def test_what_cannot_be_written(bert, tmp_path, monkeypatch):
    from regraft.frontends.export.builder import handlers

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    with pytest.raises(RegraftError, match="exists: name another folder"):
        bert.export_onnx(tmp_path / "taken")
    with pytest.raises(RegraftError, match="cannot be written"):
        bert.export_onnx("/proc/regraft/out")
    right = handlers["aten.gelu"]
    monkeypatch.setitem(
        handlers, "aten.gelu", lambda b, x, **kw: b.op("Mul", right(b, x, **kw), b.to(1.5))
    )
    with pytest.raises(RegraftError, match="differs from the compiled program"):
        bert.export_onnx(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
