import math
from dataclasses import replace

import pytest
import torch

from regraft.kernels.kvquant import cuda, reference
from regraft.kernels.kvquant.codebook import fixed
from regraft.kernels.kvquant.cuda.quantizing import code_in_turn
from regraft.kernels.kvquant.feedback import feedback
from regraft.kernels.kvquant.layout import BLOCK, pack_table
from regraft.kernels.kvquant.reference import Body
from regraft.runtime.quantized import Coding, Store

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def draw(
    batch=2, groups=4, heads=8, queries=1, size=128, bits=(4, 4), outliers=(0.01, 0.01), blocks=40,
    exact=50, calibrated=True, rotated=True, tables=1, padding=0, sinks=False,
    dtype=torch.bfloat16, jump=0, concentrated=False,
):  # fmt: skip
    """Arguments of attend with random content, exact tokens in a larger buffer.

    jump: positions left out before token 77; concentrated: outliers in one token and one channel.
    """

    def normal(*shape):
        return torch.randn(*shape, device="cuda")

    length = BLOCK * max(blocks, 2)
    k = normal(batch, heads, length, size) * (1 + normal(1, heads, 1, size).abs())
    k, v = k + 2 * normal(1, heads, 1, size), normal(batch, heads, length, size) + 0.3
    if concentrated:
        k[:, :, 5] *= 4
        v[:, :, :, 7] *= 6
    scale = zero = None
    if calibrated:
        share = torch.tensor([outliers[0] / 2, 1 - outliers[0] / 2], device="cuda")
        low, high = k[0].quantile(share, dim=1).unsqueeze(2)
        scale, zero = ((high - low) / 2).half()[None], ((high + low) / 2).half()[None]
    stores = [
        Store("key", Coding(bits[0], fixed("lloyd_max", bits[0]), outliers[0], scale, zero)),
        Store("value", Coding(bits[1], fixed("lloyd_max", bits[1]), outliers[1])),
    ]
    for store, x in zip(stores, (k, v), strict=True):
        store.append(x)
    position = (
        torch.arange(length, device="cuda") + 7 * torch.arange(tables, device="cuda")[:, None]
    )
    position = position + jump * (torch.arange(length, device="cuda") >= 77)
    angle = position[..., None] * 1e4 ** -(torch.arange(0, size, 2, device="cuda") / size)
    table = pack_table(angle.cos(), angle.sin(), "cuda") if rotated else None
    body = Body(stores[0].packed, stores[1].packed, blocks, 0 if calibrated else 64, table)
    buffers = normal(2, batch, heads, exact + 6, size).to(dtype)[:, :, :, :exact]
    mask = torch.zeros(batch, queries, exact, device="cuda")
    for s in range(queries if exact else 0):
        mask[:, s, exact - queries + 1 + s :] = -math.inf
    first = torch.arange(queries, device="cuda") + 37 * torch.arange(batch, device="cuda")[:, None]
    first = (first * bool(padding) + padding).int()
    column = normal(groups * heads) if sinks else torch.full((groups * heads,), -math.inf).cuda()
    q = (0.3 * normal(batch, groups * heads, queries, size)).to(dtype)
    return q, body, buffers[0], buffers[1], mask, first, column, size**-0.5


def error(arguments, softcap=0.0):
    q, body, key, value, *rest = arguments
    out = cuda.attend(q, body, key, value, *rest, softcap)
    wide = [q.double(), body, key.double(), value.double(), *rest, softcap]
    want = reference.attend(*wide, dtype=torch.float64)
    return float((out - want).norm() / want.norm())


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"outliers": (0.0, 0.0)},
        {"outliers": (0.2, 0.2)},
        {"outliers": (0.01, 0.0), "dtype": torch.float16},
        {"calibrated": False, "outliers": (0.0, 0.01)},
        {"bits": (3, 2)},
        {"bits": (2, 3), "rotated": False},
        {"groups": 3, "heads": 3, "size": 64},
        {"groups": 2, "heads": 4, "size": 80},
        {"groups": 1, "size": 96},
        {"heads": 2, "size": 256},
        {"groups": 8, "heads": 1},
        {"queries": 4},
        {"queries": 16, "padding": 20},
        {"batch": 3, "padding": 20, "sinks": True, "tables": 3},
        {"blocks": 0},
        {"exact": 0, "blocks": 1},
        {"jump": 1000},
        {"concentrated": True},
        {"concentrated": True, "groups": 8, "outliers": (0.05, 0.05), "dtype": torch.float16},
    ],
    ids=str,
)
def test_attend(case):
    assert error(draw(**case)) < 4e-3


def test_soft_cap():
    assert error(draw(blocks=8), softcap=5.0) < 4e-3


def test_nothing_seen_gives_zeros():
    arguments = list(draw(blocks=4, exact=8))
    arguments[4].fill_(-math.inf)
    arguments[5].fill_(4 * BLOCK)
    assert not cuda.attend(*arguments).any()


def test_outputs_repeat_exactly_and_in_a_graph():
    arguments = draw()
    out = cuda.attend(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = cuda.attend(*arguments)
    graph.replay()
    assert torch.equal(recorded, out)


def test_what_has_no_kernel():
    q, body, *rest = draw(blocks=2)
    with pytest.raises(cuda.KernelError, match="8"):
        cuda.attend(q, replace(body, key=replace(body.key, bits=8)), *rest)
    with pytest.raises(cuda.KernelError, match="float32"):
        cuda.attend(q.float(), body, *rest)


def coded(kind, size=128, bits=4, share=0.01, batch=2, heads=3, blocks=3):
    """Arguments of quantize with error feedback, for costs of channels that go together."""
    torch.manual_seed(0)
    gradient = torch.randn(heads, 2 * size, size) * torch.randn(heads, 1, size)
    gradient += 3 * torch.randn(heads, 2 * size, 1) * torch.randn(heads, 1, size)
    x = torch.randn(batch, heads, BLOCK * blocks, size, device="cuda")
    rows = [None, None]
    if kind == "key":
        rows = [2.5 + 0.3 * torch.rand(1, heads, 1, size), 0.1 * torch.randn(1, heads, 1, size)]
        rows = [row.half().cuda() for row in rows]
    fed = feedback((gradient.mT @ gradient).cuda(), rows[0])
    book = Coding(bits, fixed("lloyd_max", bits)).to(x.device).book
    return kind, x, book, bits, share, "cuda", *rows, fed


def same(found, expected):
    for part in ("codes", "scale", "zero", "outliers", "offsets"):
        one, other = getattr(found, part), getattr(expected, part)
        assert (one is None) == (other is None), part
        assert one is None or torch.equal(one, other), part


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"share": 0.0},
        {"bits": 2, "share": 0.0},
        {"bits": 3, "size": 96},
        {"bits": 2, "size": 64},
        {"size": 80},
        {"size": 256, "bits": 3, "heads": 1},
        {"blocks": 1},
        {"batch": 1, "blocks": 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["key", "value"])
def test_quantize(kind, case):
    arguments = coded(kind, **case)
    found = cuda.quantize(*arguments)
    same(found, reference.quantize(*arguments))
    assert not torch.equal(found.codes, reference.quantize(*arguments[:-1]).codes)


@pytest.mark.parametrize("size", [2, 66, 92])
def test_in_turn_of_unusual_sizes(size):
    _, x, book, *_, fed = coded("value", size=size)
    exact = torch.rand_like(x) < 0.05
    arguments = x, book.midpoints, book.levels.float() * book.unit, exact
    codes, aims = torch.empty_like(x, dtype=torch.uint8), torch.empty_like(x)
    code_in_turn(fed.matrix, *arguments[:-1], exact.view(torch.uint8), codes, aims)
    assert all(map(torch.equal, (codes, aims), fed.in_turn(*arguments)))


@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_quantize_without_feedback(kind, share):
    kind, x, book, bits, _, layout, *rows, _ = coded(kind, bits=3, blocks=4)
    if kind == "key":
        rows = [row.repeat(x.shape[0], 1, 2, 1) for row in rows]
        rows[0][1:] *= 1.5
    arguments = kind, x, book, bits, share, layout, *rows
    same(cuda.quantize(*arguments), reference.quantize(*arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_equal_numbers(kind, dtype):
    """Tokens that occur again have equal keys: any of equal candidates may be outliers."""
    kind, x, *rest = coded(kind, blocks=3)
    x = x[:, :, torch.arange(3 * BLOCK, device=x.device) % 7].to(dtype)
    found, again, expected = (
        f(kind, x, *rest) for f in (cuda.quantize, cuda.quantize, reference.quantize)
    )
    same(found, again)
    assert torch.equal(found.offsets[..., -1], expected.offsets[..., -1])
    assert torch.equal(found.scale, expected.scale)

    def errors(packed):
        body = Body(packed, packed, 3, 0, None)
        read = reference.dequantize(body, kind)
        return (read - x.float()).abs().flatten().sort().values

    assert torch.allclose(errors(found), errors(expected), atol=1e-2)


def test_quantize_without_a_kernel():
    kind, x, _, _, *rest = coded("value", share=0.0)
    book = Coding(8, fixed("uniform", 8)).to(x.device).book
    with pytest.raises(cuda.KernelError, match="256 levels"):
        cuda.quantize(kind, x, book, 8, *rest)
