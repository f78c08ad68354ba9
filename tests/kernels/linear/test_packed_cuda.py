import pytest
import torch

from regraft.kernels import ops  # noqa: F401
from regraft.kernels.compiled import KernelError
from regraft.kernels.linear.cuda import Plan, linear
from regraft.kernels.linear.formats import dequantize
from regraft.program import RegraftError
from tests.kernels.linear.packed import FORMATS, random_packed

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BOUND = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-5}
PLANS = [Plan(1, 8, 4, 1, 4), Plan(2, 4, 4, 3, 1), Plan(1, 16, 4, 1, 2), Plan(1, 8, 8, 2, 1)]


def case(format, channels, columns, count, dtype, bias=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, columns, generator=generator) * torch.logspace(-2, 0, count)[:, None]
    if format.endswith("n"):
        x = x * 1e-3  # scales of scales are large
    added = torch.randn(channels, generator=generator).to(dtype) if bias else None
    if format in ("float16", "bfloat16"):
        weight = torch.randn(channels, columns, generator=generator).to(getattr(torch, format))
    else:
        weight = random_packed(format, channels, columns)
    return [None if t is None else t.cuda() for t in (x.to(dtype), weight, added)]


def check(out, x, weight, bias, format, channels):
    """The largest error of a row."""
    dense = dequantize(weight, format, channels, x.shape[1]).double()
    wanted = x.double() @ dense.t() + (0 if bias is None else bias.double())
    assert out.dtype == x.dtype and out.shape == wanted.shape
    error = (out.double() - wanted).norm(dim=1)
    assert (error <= BOUND[x.dtype] * wanted.norm(dim=1)).all()


@cuda
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_equals_the_dequantised_product(format, dtype):
    for channels, columns, count in ((100, 512, 1), (33, 768, 5), (16, 256, 16), (4230, 1280, 3)):
        inputs = case(format, channels, columns, count, dtype, bias=count == 5)
        check(linear(*inputs, format, channels), *inputs, format, channels)


@cuda
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("format", ["int4g32z", "int4g64z", "int8g128", "int4g32zn"])
def test_every_plan(format, plan):
    for columns, count in ((256, 2), (768, 9), (4096, 1)):
        inputs = case(format, 70, columns, count, torch.bfloat16)
        check(linear(*inputs, format, 70, plan), *inputs, format, 70)


@cuda
def test_every_number_of_rows_and_a_bias():
    for count in (*range(1, 18), 40, 520):
        inputs = case("int4g32z", 50, 256, count, torch.bfloat16, bias=True)
        out = torch.ops.regraft.packed_linear(*inputs, "int4g32z", 50)
        check(out, *inputs, "int4g32z", 50)


@cuda
@pytest.mark.parametrize("columns", [1, 31, 33, 100])
def test_whole_rows_of_any_length(columns):
    inputs = case("int8", 20, columns, 3, torch.float16)
    check(linear(*inputs, "int8", 20), *inputs, "int8", 20)


@cuda
@pytest.mark.parametrize("format", ["float16", "bfloat16"])
def test_weights_of_half_precision(format):
    dtype = getattr(torch, format)
    for channels, columns, count in ((37, 64, 1), (300, 4096, 7), (16, 96, 16), (20, 64, 33)):
        inputs = case(format, channels, columns, count, dtype, bias=True)
        check(torch.ops.regraft.packed_linear(*inputs, format, channels), *inputs, format, channels)
    x, weight, _ = case(format, 20, 40, 1, dtype)
    with pytest.raises(KernelError, match="no CUDA kernel for 40 columns"):
        linear(x, weight, None, format, 20)
    with pytest.raises(KernelError, match="no CUDA kernel for activations of float32"):
        linear(x.float(), weight, None, format, 20)


@cuda
def test_views_and_other_shapes():
    x, weight, _ = case("int4g32z", 48, 128, 6, torch.bfloat16)
    odd = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(2, 3, 128)
    out = torch.ops.regraft.packed_linear(odd, weight, None, "int4g32z", 48)
    assert out.shape == (2, 3, 48)
    check(out.view(6, 48), x, weight, None, "int4g32z", 48)
    strided = torch.stack((x, x), 2)[:, :, 0]
    check(linear(strided, weight, None, "int4g32z", 48), x, weight, None, "int4g32z", 48)


@cuda
def test_a_recorded_chain_reads_what_came_before():
    """Kernels that overlap wait for their inputs, in a graph too."""
    x, weight, _ = case("bfloat16", 512, 512, 1, torch.bfloat16)
    weight = weight / 16

    def chain(x):
        for _ in range(10):
            for _ in range(3):
                x = torch.ops.regraft.packed_linear(x, weight, None, "bfloat16", 512)
            x = x / x.norm()
        return x

    wanted = chain(x)
    held = x.clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        chain(held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(held)
    for scale in (1, 2, -1):
        held.copy_(x * scale)
        graph.replay()
        torch.testing.assert_close(out, wanted * (1 if scale > 0 else -1), rtol=1e-2, atol=1e-3)


@cuda
def test_what_is_no_number_stays_none():
    x, weight, _ = case("int4g32z", 16, 64, 2, torch.bfloat16)
    x[1, 40] = float("nan")
    out = linear(x, weight, None, "int4g32z", 16)
    assert out[0].isfinite().all() and not out[1].isfinite().any()


@cuda
def test_devices_are_not_mixed():
    x, weight, _ = case("int4g32z", 16, 64, 1, torch.bfloat16)
    for mixed in ((x.cpu(), weight), (x, weight.cpu())):
        with pytest.raises(RegraftError, match="packed weights are on"):
            torch.ops.regraft.packed_linear(*mixed, None, "int4g32z", 16)


@cuda
def test_a_model_on_cuda():
    import regraft
    from tests.conftest import tiny

    model = tiny("llama", num_hidden_layers=3).to("cuda", torch.bfloat16)
    ids = torch.arange(3, 20, device="cuda")[None]
    wanted = model(input_ids=ids).logits
    for passes, bound in (([], 0.02), ([regraft.WeightQuant(bits=8)], 0.03)):
        fast = regraft.compile(model, passes, target="cuda")
        targets = {node.target for m in fast._run.step.modules() if hasattr(m, "graph")
                   for node in m.graph.nodes}  # fmt: skip
        assert torch.ops.regraft.packed_linear.default in targets
        cache = fast.new_cache()
        fast(ids[:, :-1], past_key_values=cache)
        found = fast(ids[:, -1:], past_key_values=cache).logits
        assert (found - wanted[:, -1:]).norm() <= bound * wanted[:, -1:].norm()
