import pytest
import torch
from torch import nn
from torch.export import Dim

import regraft
from regraft.frontends.module import capture_module, from_exported
from regraft.program import RegraftError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, y=None, *, double=False):
        with torch.autocast("cpu", enabled=False):
            x = self.encoder(x)
        x = self.drop(x * 2 if double else x)
        return {"sum": self.first(x) + self.second(x), "rest": (y["k"] * 2, None, 3)}


def block():
    torch.manual_seed(0)
    return Block()


def inputs(batch, length):
    return torch.randn(batch, length, 8), {"k": torch.randn(batch, 5)}


SHAPES = {"x": {0: Dim("batch"), 1: Dim.DYNAMIC}, "y": {"k": {0: Dim("batch")}}}


@pytest.fixture(scope="module")
def compiled():
    return regraft.compile(block(), example_inputs=inputs(2, 4), dynamic_shapes=SHAPES)


@pytest.mark.parametrize("sizes", [(2, 4), (1, 1), (3, 9)])
def test_module_keeps_values_and_structure_at_any_dynamic_size(compiled, sizes):
    model, (x, y) = block().eval(), inputs(*sizes)
    expected = model(x, y)
    for actual in (compiled(x, y), compiled(x, y=y), compiled(y=y, x=x)):
        torch.testing.assert_close(actual["sum"], expected["sum"], rtol=0, atol=1e-5)
        assert torch.equal(actual["rest"][0], expected["rest"][0])
        assert actual["rest"][1:] == (None, 3) and not actual["sum"].requires_grad


def test_signature_weights_and_mode_are_those_of_the_module():
    model = block()
    program = capture_module(model, inputs(2, 4), SHAPES)
    assert [(s.name, s.shape) for s in program.inputs] == [
        ("x", ("batch", "x_dim1", 8)),
        ("y.k", ("batch", 5)),
    ]
    assert program.outputs[0].shape == ("batch", "x_dim1", 8)
    assert program.graph_module.first_weight is model.first.weight
    assert model.training and model.encoder.training


def test_passes_fuse_and_raise(compiled):
    rows = {row.name: row for row in compiled.report.rows}
    assert rows["FuseLinear"].matches == 1 and rows["RaiseSdpa"].matches == 1
    assert all(row.max_abs_error <= 1e-5 for row in compiled.report.rows)


def test_exported_program_and_keyword_examples():
    model, (x, y) = block().eval(), inputs(2, 4)
    keywords = {"x": x, "y": y, "double": True}
    shapes = {**SHAPES, "double": None}
    exported = torch.export.export(model, (), keywords, dynamic_shapes=shapes, strict=False)
    for compiled in (
        regraft.compile(exported),
        regraft.compile(model, example_inputs=keywords, dynamic_shapes=shapes),
    ):
        x, y = inputs(3, 6)
        actual, expected = compiled(x=x, y=y, double=True), model(x, y, double=True)
        torch.testing.assert_close(actual["sum"], expected["sum"], rtol=0, atol=1e-5)
        with pytest.raises(RegraftError, match="False, compiled for True"):
            compiled(x=x, y=y, double=False)


def test_changed_buffers_are_refused():
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count = nn.Buffer(torch.zeros(1))

        def forward(self, x):
            self.count.add_(1)
            return x + self.count

    with pytest.raises(RegraftError, match="'count'"):
        regraft.compile(Counter(), example_inputs=(torch.ones(2),), fallback="error")


X, Y = inputs(2, 4)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X,), {}, "input y is missing"),
        ((X, Y), {"z": 1}, "unknown input z"),
        ((X, Y), {"x": X}, "x was given twice"),
        ((X, Y, 1, 2), {}, "4 positional inputs"),
        ((X[0], Y), {}, r"input x is \[4, 8\], wanted \[batch, x_dim1, 8\]"),
        ((X.double(), Y), {}, "input x is torch.float64, wanted torch.float32"),
        ((X.to("meta"), Y), {}, "input x is on meta, wanted cpu"),
        ((X[..., :4], Y), {}, "input x has size 4 in dimension 2, wanted 8"),
        ((X[:1], Y), {}, "input y.k has size 2 in dimension 0, wanted batch = 1 as in x"),
        ((X, {"q": Y["k"]}), {}, "input y is"),
        ((3, Y), {}, "input x is a int, wanted a tensor"),
    ],
)
def test_bad_input_gives_one_clear_error(compiled, args, kwargs, message):
    with pytest.raises(RegraftError, match=message):
        compiled(*args, **kwargs)


def test_limits_of_a_dimension_are_checked():
    shapes = ({0: Dim("rows", min=3, max=6)},)
    compiled = regraft.compile(nn.ReLU(), example_inputs=(torch.ones(4, 2),), dynamic_shapes=shapes)
    with pytest.raises(RegraftError, match="size 7 in dimension 0, wanted rows from 3 to 6"):
        compiled(torch.ones(7, 2))


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # the line that the message must name
            return x
        return -x


class Numpy(nn.Module):
    def forward(self, x):
        return torch.tensor(x.numpy())


class Fixed(nn.Module):
    def forward(self, x):
        return x.view(2, 4)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Branch, r"test_module.py:\d+ \(if x.sum\(\) > 0:.*depends on the values"),
        (Numpy, r"test_module.py:\d+ \(return torch.tensor\(x.numpy"),
        (Fixed, r"test_module.py:\d+: .*specialized it to be a constant \(2\)"),
    ],
)
def test_what_cannot_be_exported_names_line_and_reason(kind, message, capfd):
    with pytest.raises(RegraftError, match=message) as caught:
        regraft.compile(
            kind(),
            example_inputs=(torch.ones(2, 4),),
            dynamic_shapes=({0: Dim.DYNAMIC},),
            fallback="error",
        )
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_wrong_examples():
    with pytest.raises(RegraftError, match="example_inputs and dynamic_shapes must fit"):
        regraft.compile(nn.ReLU(), example_inputs={"y": torch.ones(2)})
    with pytest.raises(RegraftError, match="example_inputs is a str"):
        regraft.compile(nn.ReLU(), example_inputs="x")


def test_exported_without_examples_or_names():
    exported = torch.export.export(nn.Linear(4, 3), (torch.ones(2, 4),), strict=False)
    exported.example_inputs = None
    assert from_exported(exported).examples == ()
    assert regraft.compile(exported)(torch.ones(2, 4)).shape == (2, 3)
