import onnx
import pytest
import torch

import regraft
from regraft import RegraftError
from regraft.kernels.linear import onnx as bodies
from regraft.passes import WeightQuant
from regraft.program.serialize import program_tensors
from tests.conftest import tiny

pytest.importorskip("onnxruntime")
ROUNDED = "8-bit activations"
FILES = {
    "Q4_0": dict(kind="Q4_0", embedding="Q4_0"),
    "Q4_1": dict(kind="Q4_1", embedding="Q8_0"),
    "Q4_K": dict(kind="Q4_K", embedding="Q6_K", special={"ffn_down": "Q6_K"}),
    "F16": dict(kind="Q8_0", embedding="F16", special={"attn_v": "F16"}, tied=False),
}
SETTINGS = [dict(), dict(functions=False), dict(contrib=True, opset=18)]


def compiled_file(folder, **options):
    pytest.importorskip("gguf")
    from tests.gguf_files import write

    return regraft.compile(write(folder / "tiny.gguf", **options), target="reference")


def close(errors):
    rounded = errors.pop(ROUNDED)
    return rounded < 0.1 and max(errors.values()) < 1e-5


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("settings", SETTINGS[::2], ids=str)
def test_blocks_of_gguf_files(name, settings, tmp_path):
    compiled = compiled_file(tmp_path, **FILES[name])
    written = compiled.export_onnx(tmp_path / "out", **settings)
    assert close(dict(written.errors))
    held = {id(x): x.nbytes for x in program_tensors(compiled.program).values()}
    assert written.weight_bytes <= 1.01 * sum(held.values())
    assert written.file_bytes <= written.weight_bytes + 2**18
    operators = {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    assert ("MatMulNBits" if settings else "PackedLinear") in {n.split("_")[0] for n in operators}


@pytest.mark.parametrize(
    "quantised", [dict(bits=4), dict(bits=8), dict(bits=8, group=None)], ids=str
)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_rounded_weights(llama, quantised, settings, tmp_path):
    compiled = regraft.compile(llama, [WeightQuant(**quantised)], target="reference")
    written = compiled.export_onnx(tmp_path / "out", **settings)
    assert close(dict(written.errors))
    assert ("MatMulNBits" in written.fused) == ("contrib" in settings)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "exact.onnx" not in names


def test_with_a_quantised_cache(llama, tmp_path):
    passes = [WeightQuant(bits=8), regraft.KVQuant(bits=4)]
    compiled = regraft.compile(llama, passes, target="reference")
    assert close(dict(compiled.export_onnx(tmp_path / "out").errors))
    again = regraft.load(tmp_path / "out")
    ids = torch.randint(3, 256, (2, 90), generator=torch.Generator().manual_seed(1))
    wanted, found = compiled(input_ids=ids).logits, again(input_ids=ids).logits
    assert (found - wanted).norm() <= 0.05 * wanted.norm()


def test_half_precision_models(tmp_path):
    model = tiny("llama").to(torch.float16)
    compiled = regraft.compile(model, [WeightQuant(bits=8)], target="reference")
    written = compiled.export_onnx(tmp_path / "out")
    assert max(written.errors.values()) < 5e-2


def test_modules_with_biases_and_odd_columns(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(40, 23), torch.nn.GELU(), torch.nn.Linear(23, 7))
    x = torch.randn(5, 40)
    quantised = [WeightQuant(bits=8, group=None)]
    compiled = regraft.compile(model, quantised, example_inputs=(x,), target="reference")
    written = compiled.export_onnx(tmp_path / "out")
    assert max(written.errors.values()) < 1e-5


@pytest.mark.parametrize("name, settings", [("rwkv", dict(bits=4)), ("jamba", dict(group=None))])
def test_weights_in_the_body_of_a_loop(name, settings, tmp_path):
    from tests.runtime.test_recurrent import MODELS

    model = tiny(name, **MODELS[name])
    compiled = regraft.compile(model, [WeightQuant(**settings)], target="reference")
    written = compiled.export_onnx(tmp_path / "out")
    assert max(written.errors.values()) < 1e-5
    held = {id(x): x.nbytes for x in program_tensors(compiled.program).values()}
    assert written.weight_bytes <= 1.01 * sum(held.values())


def test_standard_operators_need_blocks(llama, tmp_path):
    compiled = regraft.compile(llama, [WeightQuant(bits=4)], target="reference")
    with pytest.raises(RegraftError, match="need opset 21; contrib=True needs none"):
        compiled.export_onnx(tmp_path / "out", opset=20)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", SETTINGS[::2], ids=str)
def test_a_wrong_export_is_not_written(llama, tmp_path, monkeypatch, settings):
    compiled = regraft.compile(llama, [WeightQuant(bits=4)], target="reference")
    right = bodies._offset

    def wrong(b, parts, format, scale):
        return b.op("Mul", right(b, parts, format, scale), b.constant(1.01))

    monkeypatch.setattr(bodies, "_offset", wrong)
    with pytest.raises(RegraftError, match="differs from the compiled program"):
        compiled.export_onnx(tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())
