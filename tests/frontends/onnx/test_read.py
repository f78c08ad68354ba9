import os
import random
import resource
import signal

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import regraft
from regraft.frontends.onnx.module import OnnxModule
from regraft.frontends.onnx.read import read
from regraft.frontends.onnx.values import DTYPES
from regraft.program import RegraftError

F = TensorProto.FLOAT


def info(name, shape=None, dtype=F):
    return helper.make_tensor_value_info(name, dtype, shape)


def model(nodes, inputs=("x",), outputs=("y",), held=(), opset=20, **kwargs):
    graph = helper.make_graph(
        nodes, "g", [info(n, [2, 3]) for n in inputs], [info(n) for n in outputs], list(held)
    )
    kwargs.setdefault("opset_imports", [helper.make_opsetid("", opset)])
    return helper.make_model(graph, **kwargs)


def node(operator, inputs="x", outputs="y", **kwargs):
    return helper.make_node(operator, inputs.split(), outputs.split(), **kwargs)


def weight(**changes):
    made = numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
    for name, value in changes.items():
        if name in ("dims", "float_data"):
            del getattr(made, name)[:]
            getattr(made, name).extend(value)
        else:
            setattr(made, name, value)
    return made


def added(**changes):
    return model([node("Add", "x w")], held=[weight(**changes)])


def body(operator="Relu"):
    return helper.make_graph([node(operator, "x", "b")], "body", [], [info("b")])


def function(name, called):
    return helper.make_function(
        "own", name, ["a"], ["b"], [node(*called, domain="own")], [helper.make_opsetid("own", 1)]
    )


def with_functions(*functions):
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    made = node(functions[0].name, domain="own")
    return model([made], functions=functions, opset_imports=opsets)


def doubling():
    """Functions that call the next one twice: 2 ** 40 nodes in all."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    made = []
    for i in range(40):
        domain, called = ("own", f"f{i + 1}") if i < 39 else ("", "Relu")
        nodes = [node(called, "a", "c", domain=domain), node(called, "c", "b", domain=domain)]
        made.append(helper.make_function("own", f"f{i}", ["a"], ["b"], nodes, opsets))
    return with_functions(*made)


def nested(depth):
    """If in If, written by hand: protobuf's own classes stop at 100 messages."""

    def field(number, data):
        size, length = b"", len(data)
        while length > 127:
            size += bytes([length & 127 | 128])
            length >>= 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + data

    graph = b""
    for _ in range(depth):
        graph = field(1, field(4, b"If") + field(5, field(6, graph)))
    return b"\x08\x0a" + field(7, graph)


SHORT = TensorProto(data_type=F, dims=[4], float_data=[1])
CYCLE = [node("Add", "x b", "a"), node("Relu", "a", "b"), node("Relu", "b", "y")]
BAD = {
    "not an ONNX": (b"\x08\x01\x3a\xff\xff\x01", "truncated or no ONNX model"),
    "empty": (b"", "empty"),
    "text": (b"<!doctype html>\n<html>", "is text"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "zip": (b"PK\x03\x04" + bytes(40), "zip archive: unpack"),
    "truncated": (added().SerializeToString()[:-9], "truncated"),
    "no graph": (onnx.ModelProto(ir_version=9), "no graph"),
    "other type": (3, "int is no ONNX model"),
    "cycle": (model(CYCLE), "has a cycle: .*Relu of 'b'"),
    "no producer": (model([node("Add", "x z")]), "nothing makes 'z', which Add of 'y' reads"),
    "no output": (model([node("Relu", "x", "z")]), "nothing makes the output 'y'"),
    "twice": (model([node("Relu"), node("Exp")]), "'y' is made twice"),
    "two inputs": (model([node("Relu")], inputs="xx"), "two inputs are named 'x'"),
    "old": (model([node("Relu")], opset=6), "opset 6 is older than 7"),
    "new": (model([node("Relu")], opset=999), "newer than"),
    "no opset": (model([node("Relu")], opset_imports=[]), "no opset"),
    "operator": (model([node("Sofmax", name="n")]), "Sofmax 'n' is not supported.*Softmax"),
    "domain": (model([node("Foo", domain="bar")]), "bar::Foo of 'y'.*'bar' is unknown.*ai.onnx"),
    "contrib": (
        model([node("Gelo", domain="com.microsoft")]), "com.microsoft::Gelo of 'y'",
    ),
    "attribute": (model([node("Exp", alpha=1.0)]), "attribute 'alpha' is unknown"),
    "short": (added(raw_data=bytes(20)), "'w' has 20 bytes where FLOAT 2x3 takes 24"),
    "short numbers": (
        model([node("Constant", "", "y", value=SHORT)]),
        "has 1 numbers where FLOAT 4 takes 4",
    ),
    "absurd": (added(dims=[2**40, 2**20]), "takes 4611686018427387904"),
    "negative": (added(dims=[-2, -3]), "negative size -3"),
    "type": (added(data_type=77), "unknown type 77"),
    "recursion": (with_functions(function("f", ("f", "a", "b"))), "'f' calls itself"),
    "explosion": (doubling(), "nodes with its functions written out"),
    "deep": (nested(200), "nest too deeply"),
    "in body": (
        model([node("If", "x", then_branch=body(), else_branch=body("Foo"))]), "Foo of 'b'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_damage_is_one_error_in_one_line(name):
    source, said = BAD[name]
    with pytest.raises(RegraftError, match=said) as caught:
        OnnxModule(source)
    assert "\n" not in str(caught.value)


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(RegraftError, match="m.onnx does not exist"):
        regraft.compile(path)
    path.write_bytes(b"")
    with pytest.raises(RegraftError, match="m.onnx: the file is empty"):
        regraft.compile(str(path))
    with pytest.raises(RegraftError, match="is a folder"):
        read(tmp_path)


def test_unsorted_nodes_are_sorted():
    branch = helper.make_graph([node("Exp", "late", "b")], "b", [], [info("b")])
    nodes = [
        node("If", "c", "y", then_branch=branch, else_branch=branch),
        node("Relu", "x", "late"),
        node("Cast", "n", "c", to=TensorProto.BOOL),
        node("ReduceMax", "x", "n", keepdims=0),
    ]
    x = torch.ones(2, 3)
    assert torch.equal(OnnxModule(model(nodes))(x), x.exp())


def external(location="w.bin", **entries):
    made = added()
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return made


def test_external_data_is_mapped(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "w.bin").write_bytes(bytes(8) + np.full(6, 2, np.float32).tobytes())
    onnx.save(external("deep/w.bin", offset=8, length=24), tmp_path / "m.onnx")
    assert torch.equal(OnnxModule(tmp_path / "m.onnx")(torch.zeros(2, 3)), torch.full((2, 3), 2.0))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"location": "none.bin"}, "'none.bin' is missing"),
        ({"location": ""}, "names no file"),
        ({"location": "../w.bin"}, "outside the model's folder"),
        ({"location": "/w.bin"}, "outside the model's folder"),
        ({"location": "link.bin"}, "outside the model's folder"),
        ({"location": "links/w.bin"}, "outside the model's folder"),
        ({"offset": 8}, "bytes 8 to 32 of 'w.bin', which has 24"),
        ({"offset": -4}, "bytes -4 to"),
        ({"length": 20}, "20 bytes where FLOAT 2x3 takes 24"),
        ({"offset": "x"}, "no number"),
    ],
)
def test_external_data_is_checked(tmp_path, entries, said):
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "w.bin").write_bytes(bytes(24))
    os.symlink(tmp_path / "w.bin", folder / "link.bin")
    os.symlink(tmp_path, folder / "links")
    made = external(**{"location": "w.bin", **entries})
    (folder / "m.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(RegraftError, match=said):
        read(folder / "m.onnx")


def test_external_data_needs_a_folder():
    with pytest.raises(RegraftError, match="give the model's path"):
        read(external().SerializeToString())


def seeds():
    rng = np.random.default_rng(0)
    w, b = rng.normal(size=(3, 4)).astype(np.float32), np.ones(4, np.float32)
    held = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")]
    linear = model([node("Gemm", "x w b", "h"), node("Softmax", "h", axis=-1)], held=held)
    shape = numpy_helper.from_array(np.array([3, -1]), "s")
    views = [node("Reshape", "x s", "r"), node("Transpose", "r", "t", perm=[1, 0]),
             node("Slice", "t i j", "y")]  # fmt: skip
    ends = [numpy_helper.from_array(np.array([v]), n) for v, n in ((0, "i"), (1, "j"))]
    branch = node("If", "c", "y", then_branch=body(), else_branch=body("Exp"))
    choice = model([node("ReduceMax", "x", "n", keepdims=0),
                    node("Cast", "n", "c", to=TensorProto.BOOL), branch])  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    own = helper.make_function("own", "f", ["a"], ["b"], [node("Relu", "a", "b")], opsets[:1])
    called = model([node("f", domain="own")], functions=[own], opset_imports=opsets)
    return [
        m.SerializeToString() for m in (linear, model(views, held=[shape, *ends]), choice, called)
    ]


def mutated(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(data))
        stop = min(len(data), start + rng.randint(1, 12))
        kind = rng.choice("flip flip flip cut double".split())
        if kind == "flip":
            data[start] = rng.randrange(256)
        elif kind == "cut":
            del data[start:stop]
        else:
            data[start:start] = data[start:stop]
        if not data:
            break
    return bytes(data)


def run(data):
    module = OnnxModule(data)
    inputs = []
    for value in module.input_values:
        shape = [d if isinstance(d, int) else 2 for d in value.shape or ()]
        if not 0 <= np.prod([float(max(d, 0)) for d in shape]) < 1e6 or min(shape, default=0) < 0:
            raise RegraftError("too large to make inputs for")
        inputs.append(torch.ones(shape, dtype=DTYPES.get(value.dtype, torch.float32)))
    module(*inputs)


def fuzz(count):
    def stop(*_):
        raise TimeoutError

    rng, sources, fine = random.Random(0), seeds(), 0
    for source in sources:
        run(source)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        for _ in range(count):
            signal.alarm(5)
            try:
                run(mutated(rng.choice(sources), rng))
                fine += 1
            except RegraftError as error:
                assert "\n" not in str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert 0 < fine < count


def test_mutated_files_run_or_raise_regraft_error():
    fuzz(300)


@pytest.mark.slow
def test_many_mutated_files_run_or_raise_regraft_error():
    fuzz(3000)


def large(folder, held):
    """A weight of 2.4 GB, all holes on disk but its end, and a model that reads three rows."""
    rows = 600_000
    with (folder / "w.bin").open("wb") as file:
        file.truncate(held)
        if held == rows * 4000:
            file.seek(-4000, os.SEEK_END)
            file.write(np.full(1000, 2, np.float32).tobytes())
    weight = TensorProto(name="w", data_type=F, dims=[rows, 1000])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="w.bin")
    made = model([node("Gather", "w i")], inputs=("i",), held=[weight])
    made.graph.input[0].CopyFrom(info("i", ["n"], TensorProto.INT64))
    onnx.save(made, folder / "m.onnx")
    return folder / "m.onnx"


def test_weights_over_two_gigabytes_stay_on_disk(tmp_path):
    path = large(tmp_path, 600_000 * 4000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = OnnxModule(path)(torch.tensor([0, 599_999, 7]))
    assert found.sum(1).tolist() == [0, 2000, 0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_weights_over_two_gigabytes_that_are_cut_are_refused(tmp_path):
    path = large(tmp_path, 600_000 * 4000 - 1)
    with pytest.raises(RegraftError, match="bytes 0 to 2400000000 of 'w.bin'.*has 2399999999"):
        read(path)


def sparse(dims=(2, 3), values=(5.0, 7.0), indices=((0, 1), (1, 2))):
    made = model([node("Add", "x w")])
    held = made.graph.sparse_initializer.add(dims=dims)
    held.values.CopyFrom(numpy_helper.from_array(np.array(values, np.float32), "w"))
    held.indices.CopyFrom(numpy_helper.from_array(np.array(indices), "i"))
    return made


@pytest.mark.parametrize("indices", [((0, 1), (1, 2)), (1, 5)])
def test_sparse_initialisers_become_dense(indices):
    found = OnnxModule(sparse(indices=indices))(torch.zeros(2, 3))
    assert found.tolist() == [[0, 5, 0], [0, 0, 7]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dims": (2**20, 2**20)}, "more than 1073741824 bytes dense"),
        ({"dims": (-2, -3)}, "more than"),
        ({"indices": (1, 6)}, "index outside of"),
        ({"indices": ((0, 1), (-1, 2))}, "index outside of"),
        ({"indices": (1, 2, 3)}, "do not fit"),
    ],
)
def test_sparse_initialisers_are_checked(changes, said):
    with pytest.raises(RegraftError, match=said):
        read(sparse(**changes))
