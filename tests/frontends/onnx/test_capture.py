import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import regraft
from regraft.frontends.onnx.module import OnnxModule
from regraft.frontends.onnx.values import strings
from regraft.program import RegraftError

F, INT, B = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


@pytest.fixture(autouse=True)
def no_inductor(monkeypatch, tmp_path):
    monkeypatch.setenv("REGRAFT_INDUCTOR", "0")
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path))


def info(name, shape=None, dtype=F):
    return helper.make_tensor_value_info(name, dtype, shape)


def node(operator, inputs, outputs, **kwargs):
    return helper.make_node(operator, inputs.split(), outputs.split(), **kwargs)


def held(name, values, dtype=np.int64):
    return numpy_helper.from_array(np.array(values, dtype), name)


def graph(nodes, inputs, outputs, weights=(), name="g"):
    return helper.make_graph(nodes, name, inputs, outputs, list(weights))


def model(*parts, opset=20, **kwargs):
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    return helper.make_model(graph(*parts), opset_imports=opsets, ir_version=10, **kwargs)


def flat():
    """Two inputs that share both sizes, joined and flattened by arithmetic on the shape."""
    nodes = [
        node("Shape", "x", "s"), node("ReduceProd", "s", "n", keepdims=1),
        node("Add", "x y", "z"), node("Reshape", "z n", "flat"),
    ]  # fmt: skip
    inputs = [info("x", ["batch", "length"]), info("y", ["batch", "length"])]
    return model(nodes, inputs, [info("flat", ["n"])])


def check(made, *inputs, **options):
    """Equal to onnxruntime; inputs: arrays by name, one dict a call."""
    compiled = regraft.compile(made, **options)
    session = onnxruntime.InferenceSession(made.SerializeToString())
    for given in inputs:
        want = session.run(None, given)
        got = compiled({name: torch.from_numpy(value) for name, value in given.items()})
        for mine, theirs in zip(got if isinstance(got, tuple) else (got,), want, strict=True):
            np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-4, atol=1e-5)
    return compiled


def floats(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_dynamic_sizes_keep_their_names_and_vary():
    given = [{"x": floats(b, n), "y": floats(b, n)} for b, n in ((1, 1), (2, 7), (5, 3))]
    compiled = check(flat(), *given)
    assert "python" not in compiled.program.metadata
    assert [spec.shape for spec in compiled.program.inputs] == [("batch", "length")] * 2
    assert [spec.name for spec in compiled.program.inputs] == ["x", "y"]


def test_every_way_to_name_and_to_call_a_model(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(flat(), path)
    x, y = torch.ones(2, 3), torch.arange(6.0).reshape(2, 3)
    for source in (path, str(path), path.read_bytes(), flat()):
        compiled = regraft.compile(source)
        for made in (
            compiled(x, y),
            compiled(x, y=y),
            compiled(y=y, x=x),
            compiled({"y": y, "x": x}),
        ):
            assert torch.equal(made, (x + y).flatten())


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((torch.ones(2, 3),), {}, "input y is missing"),
        ((torch.ones(2, 3),) * 3, {}, "3 positional inputs"),
        ((torch.ones(2, 3),) * 2, {"z": torch.ones(1)}, "unknown input z"),
        ((torch.ones(2, 3),) * 2, {"x": torch.ones(2, 3)}, "input x was given twice"),
        ((torch.ones(2, 3), torch.ones(2)), {}, "input y has 1 dimensions|input y"),
        ((torch.ones(2, 3), torch.ones(2, 3).int()), {}, "input y"),
        ((torch.ones(2, 3), torch.ones(2, 4)), {}, "length"),
    ],
)
def test_wrong_inputs_are_one_error(args, kwargs, said):
    compiled = regraft.compile(flat())
    with pytest.raises(RegraftError, match=said) as caught:
        compiled(*args, **kwargs)
    assert "\n" not in str(caught.value)


def branching():
    then = graph([node("Exp", "x", "a")], [], [info("a")], name="then")
    other = graph([node("Neg", "x", "b")], [], [info("b")], name="else")
    nodes = [node("If", "c", "y", then_branch=then, else_branch=other)]
    return model(nodes, [info("x", ["n"]), info("c", [], B)], [info("y", ["n"])])


def test_a_branch_on_data_runs_whole():
    given = [{"x": floats(n), "c": np.array(c)} for n, c in ((3, True), (4, False))]
    compiled = check(branching(), *given)
    assert "If" in compiled.program.metadata["python"]
    with pytest.raises(RegraftError, match="input c is missing"):
        compiled(torch.ones(3))
    with pytest.raises(RegraftError, match="no pass applies"):
        regraft.compile(branching(), [regraft.KVQuant(bits=4)])


def test_sizes_may_depend_on_data():
    made = model([node("NonZero", "x", "y")], [info("x", ["n"])], [info("y", [1, "k"], INT)])
    check(made, {"x": np.array([0, 1, 2], np.float32)}, {"x": np.zeros(2, np.float32)})


def test_loop_counts_are_inputs_or_constants():
    body = graph(
        [node("Add", "s x", "t"), node("Identity", "c", "d"), node("Identity", "t", "row")],
        [info("i", [], INT), info("c", [], B), info("s", ["n"])],
        [info("d", [], B), info("t", ["n"]), info("row", ["n"])],
    )
    loop = node("Loop", "count  x", "last rows", body=body)
    loop.input[1:] = ["", "x"]
    outputs = [info("last", ["n"]), info("rows", ["k", "n"])]
    x = {"x": floats(3)}
    constant = check(model([loop], [info("x", ["n"])], outputs, [held("count", 4)]), x)
    assert "python" not in constant.program.metadata
    given = model([loop], [info("x", ["n"]), info("count", [], INT)], outputs)
    check(given, *({**x, "count": np.array(n)} for n in (1, 5)))


def test_scan():
    body = graph(
        [node("Add", "s e", "t"), node("Identity", "t", "row")],
        [info("s", [2]), info("e", [2])], [info("t", [2]), info("row", [2])],
    )  # fmt: skip
    scan = node("Scan", "start x", "last rows", body=body, num_scan_inputs=1)
    made = model([scan], [info("start", [2]), info("x", [5, 2])], [info("last"), info("rows")])
    check(made, {"start": floats(2), "x": floats(5, 2)})


def test_sequences():
    nodes = [
        node("SplitToSequence", "x", "parts", axis=0), node("SequenceAt", "parts one", "second"),
        node("SequenceInsert", "parts second", "more"),
        node("ConcatFromSequence", "more", "y", axis=0),
    ]  # fmt: skip
    made = model(nodes, [info("x", [3, 2])], [info("y")], [held("one", 1)])
    check(made, {"x": floats(3, 2)})


def test_local_functions_with_attributes():
    inner = node("LeakyRelu", "a", "b")
    inner.attribute.add(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    opsets = [helper.make_opsetid("", 20)]
    own = helper.make_function("own", "leak", ["a"], ["b"], [inner], opsets, ["slope"])
    call = node("leak", "x", "y", domain="own", slope=0.5)
    made = model([call], [info("x", ["n"])], [info("y", ["n"])], functions=[own])
    check(made, {"x": floats(3)}, {"x": floats(8)})


def test_strings():
    text = TensorProto.STRING
    nodes = [node("StringConcat", "x x", "y")]
    made = model(nodes, [info("x", ["n"], text)], [info("y", ["n"], text)])
    compiled = regraft.compile(made)
    assert "no tensor of numbers" in compiled.program.metadata["python"]
    assert compiled(strings(["a", "b"])).values.tolist() == ["aa", "bb"]


def test_negative_sizes_of_older_files_are_dynamic():
    made = model([node("Relu", "x", "y")], [info("x", [-1, 3])], [info("y")])
    compiled = check(made, {"x": floats(2, 3)}, {"x": floats(5, 3)})
    assert compiled.program.inputs[0].shape == ("x_dim0", 3)


def test_an_inputs_default_may_be_replaced():
    made = model([node("Add", "x w", "y")], [info("x", [2]), info("w", [2])], [info("y")],
                 [held("w", [1, 2], np.float32)])  # fmt: skip
    module = OnnxModule(made)
    assert module.inputs == ["x"]
    assert module(torch.zeros(2)).tolist() == [1, 2]
    assert module(torch.zeros(2), w=torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_recurrent_weights_of_wrong_sizes_are_one_error(kind):
    gates = {"GRU": 3, "LSTM": 4}[kind]
    weights = [held("w", floats(1, gates * 4, 5), np.float32),
               held("r", floats(1, gates * 4, 4), np.float32)]  # fmt: skip
    nodes = [node(kind, "x w r", "y", hidden_size=4)]
    if kind == "GRU":
        nodes[0].attribute.append(helper.make_attribute("linear_before_reset", 1))
    made = model(nodes, [info("x", [2, 1, 5])], [info("y")], weights)
    module = OnnxModule(made)
    module(torch.ones(2, 1, 5))
    with pytest.raises(RegraftError, match="wanted torch.float32"):
        module(torch.ones(2, 1, 5).double())
    with pytest.raises(RegraftError, match=f"{kind} of 'y'.*wanted torch.float32"):
        module(torch.ones(2, 1, 6))
