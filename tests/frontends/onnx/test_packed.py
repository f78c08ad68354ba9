"""ONNX models of packed weights keep them packed."""

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper

import regraft
from regraft.passes import WeightQuant
from regraft.program.serialize import program_tensors

PACKED = torch.ops.regraft.packed_linear.default
EMBEDDING = torch.ops.regraft.packed_embedding.default
IDS = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(0))
FILES = {
    "Q4_1": dict(kind="Q4_1", embedding="Q8_0"),
    "Q4_K": dict(kind="Q4_K", embedding="Q6_K", special={"ffn_down": "Q6_K"}),
    "F16": dict(kind="Q8_0", embedding="F16", special={"attn_v": "F16"}, tied=False),
}


def nodes(compiled, target):
    return compiled.program.graph.find_nodes(op="call_function", target=target)


def held(compiled):
    return sum(
        x.nbytes for x in {id(x): x for x in program_tensors(compiled.program).values()}.values()
    )


@pytest.mark.parametrize("name", FILES)
def test_exports_come_back(name, tmp_path):
    pytest.importorskip("gguf")
    from tests.gguf_files import write

    before = regraft.compile(write(tmp_path / "tiny.gguf", **FILES[name]), target="reference")
    before.export_onnx(tmp_path / "out")
    after = regraft.compile(tmp_path / "out", target="reference")
    assert len(nodes(after, PACKED)) >= 9 and len(nodes(after, EMBEDDING)) == 1
    assert not nodes(after, torch.ops.aten.linear.default)
    assert held(after) <= 1.02 * held(before)
    wanted, found = (one(input_ids=IDS).logits for one in (before, after))
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    after.export_onnx(tmp_path / "again")


@pytest.mark.parametrize(
    "settings", [dict(bits=4), dict(bits=8, group=64), dict(bits=8, group=None)], ids=str
)
@pytest.mark.parametrize("contrib", [False, True])
def test_rounded_weights_come_back(llama, settings, contrib, tmp_path):
    before = regraft.compile(llama, [WeightQuant(**settings)], target="reference")
    before.export_onnx(tmp_path / "out", contrib=contrib)
    after = regraft.compile(tmp_path / "out", [regraft.KVQuant(bits=8)], target="reference")
    if settings.get("group", 32) or not contrib:
        assert len(nodes(after, PACKED)) == 9
    wanted, found = (one(input_ids=IDS).logits for one in (before, after))
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    after.save(tmp_path / "saved")
    assert torch.equal(regraft.load(tmp_path / "saved")(input_ids=IDS).logits, found)


def model(scales, zeros=None, **changes):
    """MatMulNBits of 64 columns and 24 rows."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (24, 2, 16)).astype(np.uint8)
    settings = dict(K=64, N=24, bits=4, block_size=32, **changes)
    inputs = {"codes": codes, "scales": scales} | ({} if zeros is None else {"zeros": zeros})
    node = helper.make_node(
        "MatMulNBits", ["x", *inputs], ["y"], domain="com.microsoft", **settings
    )
    graph = helper.make_graph(
        [node], "one",
        [helper.make_tensor_value_info("x", 1, ["n", 64])],
        [helper.make_tensor_value_info("y", 1, ["n", 24])],
        [numpy_helper.from_array(x, name) for name, x in inputs.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_blocks_of_onnxruntime_are_kept_where_scales_are_halves():
    onnxruntime = pytest.importorskip("onnxruntime")
    scales = np.random.default_rng(1).random((24, 2)).astype(np.float16).astype(np.float32)
    zeros = np.full((24, 1), 0x77, np.uint8)
    for given, packed in (((scales,), 1), ((scales / 3,), 0), ((scales, zeros), 0)):
        made = model(*given)
        compiled = regraft.compile(made, example_inputs=(torch.randn(3, 64),))
        assert len(nodes(compiled, PACKED)) == packed
        x = torch.randn(2, 64)
        session = onnxruntime.InferenceSession(
            made.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        (wanted,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(compiled(x), torch.from_numpy(wanted), rtol=1e-4, atol=1e-4)
    (node,) = nodes(regraft.compile(model(scales)), PACKED)
    assert node.args[3:] == ("int4g32", 24)
