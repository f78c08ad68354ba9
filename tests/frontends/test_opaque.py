import pytest
import torch

import regraft
from regraft.benchmarks.small_models import small_model
from regraft.frontends.opaque import around_data
from regraft.program import RegraftError


def test_a_loop_over_chosen_experts_is_one_operator():
    model = small_model("dbrx")
    kinds = [type(module) for module in model.modules()]
    compiled = regraft.compile(model, target="reference")
    assert [type(module) for module in model.modules()] == kinds
    target = torch.ops.regraft.module.default
    assert len(compiled.program.graph.find_nodes(op="call_function", target=target)) == 2
    ids = torch.randint(3, 256, (2, 7), generator=torch.Generator().manual_seed(0))
    del kinds
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert (compiled(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


class _Counts(torch.nn.Module):
    def forward(self, x):
        return x[: int(x.sum())]


class _Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.counts = _Counts()

    def forward(self, x):
        return self.counts(x) + 1


def test_a_module_that_changes_its_shape_is_refused():
    model, x = _Model(), torch.ones(4)

    def attempt():
        mode = torch._subclasses.FakeTensorMode(
            shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv()
        )
        try:
            with mode:
                model(mode.from_tensor(x))
        except Exception as error:
            raise RegraftError("cannot follow") from error
        return regraft.program.Program(torch.fx.GraphModule({}, torch.fx.Graph()), (), ())

    program = around_data(model, attempt)
    (opaque,) = program.metadata["modules"]
    assert type(model.counts) is _Counts
    with pytest.raises(RegraftError, match="_Counts depends on data"):
        torch.ops.regraft.module([x / 2], opaque.number)


def test_another_failure_is_passed_on():
    def attempt():
        raise RegraftError("something else")

    with pytest.raises(RegraftError, match="something else"):
        around_data(_Model(), attempt)
