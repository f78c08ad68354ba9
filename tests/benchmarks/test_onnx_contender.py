import pytest
import torch

from regraft.benchmarks import contenders
from regraft.benchmarks.contenders import ONNX, build, generate
from regraft.program import RegraftError

VOCABULARY = 40


def export(folder):
    """A decoder of one layer whose next id is the last id plus the length of the past."""
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto

    def value(name, kind, shape):
        return helper.make_tensor_value_info(name, kind, shape)

    def constant(name, values):
        return helper.make_node(
            "Constant", [], [name], value=onnx.numpy_helper.from_array(values.numpy())
        )

    states = [f"past_key_values.0.{kind}" for kind in ("key", "value")]
    nodes = [
        constant("axes", torch.tensor([1, 3])),
        constant("last", torch.tensor([2])),
        constant("vocabulary", torch.arange(VOCABULARY)),
        constant("heads", torch.tensor([1, 2, 1, 4])),
        helper.make_node("Cast", ["input_ids"], ["floats"], to=kinds.FLOAT),
        helper.make_node("Unsqueeze", ["floats", "axes"], ["flat"]),
        helper.make_node("Tile", ["flat", "heads"], ["new"]),
        helper.make_node("Shape", [states[0]], ["past"], start=2, end=3),
        helper.make_node("Add", ["input_ids", "past"], ["next"]),
        helper.make_node("Unsqueeze", ["next", "last"], ["column"]),
        helper.make_node("Equal", ["column", "vocabulary"], ["equal"]),
        helper.make_node("Cast", ["equal"], ["logits"], to=kinds.FLOAT),
    ]
    for name in states:
        present = name.replace("past_key_values", "present")
        nodes.append(helper.make_node("Concat", [name, "new"], [present], axis=2))
    inputs = [value("input_ids", kinds.INT64, [1, "n"])]
    inputs += [value("attention_mask", kinds.INT64, [1, "m"])]
    inputs += [value(name, kinds.FLOAT, [1, 2, "t", 4]) for name in states]
    outputs = [value("logits", kinds.FLOAT, [1, "n", VOCABULARY])]
    outputs += [
        value(name.replace("past_key_values", "present"), kinds.FLOAT, [1, 2, "m", 4])
        for name in states
    ]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), folder / "model.onnx")


def test_an_export_generates_and_keeps_its_past(tmp_path):
    pytest.importorskip("onnxruntime")
    export(tmp_path)
    contender = build(ONNX, None, tmp_path)
    cache = contender.new_cache(8)
    assert generate(contender, torch.tensor([[3, 4]]), cache, 4).item() == 13
    assert cache.length == 5 and cache.nbytes == 2 * 2 * 5 * 4 * 4
    cache.reset()
    contender.take(cache, [(torch.ones(1, 2, 7, 4), torch.ones(1, 2, 7, 4))])
    assert generate(contender, torch.tensor([[3]]), cache, 1).item() == 10
    assert cache.length == 8


def test_no_export_is_an_error_that_says_so(tmp_path):
    with pytest.raises(RegraftError, match="holds no model.onnx"):
        contenders.onnx_contender(tmp_path)
