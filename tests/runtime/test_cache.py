import pytest
import torch
import torch.nn.functional as F

from regraft.kernels.kvquant.codebook import fixed
from regraft.kernels.kvquant.layout import LAYOUTS, unpack_table
from regraft.kernels.ops import causal_mask
from regraft.kernels.rotary.reference import rotate
from regraft.runtime.buffer import RotationTable
from regraft.runtime.cache import CacheState, DenseLayer
from regraft.runtime.quantized import Coding, QuantizedLayer

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def plain(q, k, v, mask=None, scale=None, softcap=0.0, sinks=None, causal=True, window=0):
    """Float64 attention, one head at a time."""
    rows, length, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    out = []
    for h in range(q.shape[1]):
        a, b, c = q[:, h].double(), k[:, h // groups].double(), v[:, h // groups].double()
        scores = a @ b.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        position = torch.arange(length - rows, length)[:, None]
        allowed = torch.ones(rows, length, dtype=torch.bool)
        if mask is None and causal:
            allowed &= torch.arange(length) <= position
        if window:
            allowed &= torch.arange(length) > position - window
            allowed &= torch.arange(length) <= position
        scores = scores.masked_fill(~allowed, -torch.inf)
        if mask is not None:
            part = mask[:, h if mask.shape[1] > 1 else 0]
            if part.dtype == torch.bool:
                scores = scores.masked_fill(~part, -torch.inf)
            else:
                scores = scores + part
        weight = scores.exp()
        total = weight.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + sinks[h].double().exp()
        out.append((weight / total) @ c)
    return torch.stack(out, 1).float()


def qkv(batch, heads, shared, rows, size=16, value_size=None, seed=0):
    torch.manual_seed(seed)
    return (
        torch.randn(batch, heads, rows, size),
        torch.randn(batch, shared, rows, size),
        torch.randn(batch, shared, rows, value_size or size),
    )


def angles(rows, size=16, seed=5):
    torch.manual_seed(seed)
    angle = torch.randn(1, rows, size // 2)
    return angle.cos(), angle.sin()


def feed(layer, q, k, v, chunks, table=None, rotation=None, **options):
    out, start = [], 0
    for size in chunks:
        part = slice(start, start + size)
        if table is not None:
            table.append(rotation[0][:, part], rotation[1][:, part])
        step = layer.step(q[:, :, part], k[:, :, part], v[:, :, part], table, **options)
        out.append(step)
        start += size
    return torch.cat(out, 2)


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (9, 3), (4, 1)])
@pytest.mark.parametrize("value_size", [16, 8])
@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("variant", ["plain", "softcap", "sinks", "both"])
def test_dense_matches_plain(heads, shared, value_size, window, variant):
    q, k, v = qkv(2, heads, shared, 30, value_size=value_size)
    options = {"scale": 0.3, "window": window}
    if variant in ("softcap", "both"):
        options["softcap"] = 2.0
    if variant in ("sinks", "both"):
        options["sinks"] = torch.randn(heads)
    out = feed(DenseLayer(), q, k, v, [20, 1, 1, 8], **options)
    torch.testing.assert_close(out, plain(q, k, v, **options), **TOLERANCE)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("mask_heads", [1, 6])
@pytest.mark.parametrize("mask_batch", [1, 2])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 6])
def test_dense_masks(rows, mask_heads, mask_batch, kind, softcap, window):
    q, k, v = qkv(2, 6, 2, 24)
    mask = torch.randn(mask_batch, mask_heads, rows, 24)
    if kind == "bool":
        mask = mask > 0
        mask[..., 24 - rows :] = True
    layer = DenseLayer()
    layer.append(k, v)
    q = q[:, :, -rows:]
    out = layer.attend(q, mask, None, softcap, window=window)
    expected = plain(q, k, v, mask, softcap=softcap, window=window)
    torch.testing.assert_close(out, expected, **TOLERANCE)


def test_dense_bidirectional():
    q, k, v = qkv(1, 4, 2, 12)
    out = feed(DenseLayer(), q, k, v, [12], causal=False)
    torch.testing.assert_close(out, plain(q, k, v, causal=False), **TOLERANCE)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_fully_masked_row_is_finite(softcap):
    q, k, v = qkv(1, 4, 2, 3)
    mask = torch.ones(3, 3, dtype=torch.bool).tril()[None, None].clone()
    mask[..., 0] = False
    assert feed(DenseLayer(), q, k, v, [3], mask=mask, softcap=softcap).isfinite().all()


@pytest.mark.parametrize("length", [511, 512, 513, 1000, 1001])
@pytest.mark.parametrize(("heads", "shared"), [(9, 3), (4, 1), (4, 2)])
def test_long_decode_matches_plain(length, heads, shared):
    q, k, v = qkv(1, heads, shared, length, 64)
    layer = DenseLayer()
    layer.append(k, v)
    out = layer.attend(q[:, :, -1:], scale=0.2)
    torch.testing.assert_close(out, plain(q[:, :, -1:], k, v, scale=0.2), **TOLERANCE)


def test_dense_growth_keeps_contents_and_copies_rarely():
    q, k, v = qkv(1, 2, 2, 600)
    layer, pointers = DenseLayer(), set()
    for i in range(600):
        layer.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        pointers.add(layer.key.data_ptr())
    assert torch.equal(layer.key, k) and torch.equal(layer.value, v)
    assert len(pointers) == 3
    assert layer.nbytes == 2 * 768 * 2 * 16 * 4


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_quantized_is_exact_in_sink_and_tail(bits, interleaved):
    q, k, v = qkv(2, 6, 2, 60)
    options = {"interleaved": interleaved, "offset": 4, "rotation": angles(60, 8)}
    dense = feed(DenseLayer(), q, k, v, [2, 1, 40, 17], RotationTable(), **options)
    out = feed(QuantizedLayer.data_free(bits), q, k, v, [2, 1, 40, 17], RotationTable(), **options)
    torch.testing.assert_close(out, dense, **TOLERANCE)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("chunks", [[300] + [1] * 100, [1] * 400, [150, 250]])
def test_quantized_eight_bits_is_close(rotated, chunks):
    q, k, v = qkv(2, 6, 2, 400, value_size=24)
    tables = [RotationTable(), RotationTable()] if rotated else [None, None]
    rotation = angles(400)
    layer = QuantizedLayer.data_free(8)
    dense = feed(DenseLayer(), q, k, v, chunks, tables[0], rotation)
    out = feed(layer, q, k, v, chunks, tables[1], rotation)
    assert layer.length == 400 and layer.floor > 0
    torch.testing.assert_close(out[:, :, : chunks[0]], dense[:, :, : chunks[0]], **TOLERANCE)
    torch.testing.assert_close(out, dense, atol=0.03, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_spread_channels_hide_outliers_and_read_back(interleaved):
    q, k, v = qkv(2, 6, 2, 200)
    v[..., 5] *= 20
    book, rotation = Coding(3, fixed("lloyd_max", 3)), angles(200)
    layers = [DenseLayer(), *(QuantizedLayer(book, book, spread=s) for s in (False, True))]
    tables, options = [RotationTable() for _ in layers], {"interleaved": interleaved}
    dense, plain, spread = (
        feed(layer, q, k, v, [150, 40, 10], table, rotation, **options)
        for layer, table in zip(layers, tables, strict=True)
    )
    assert (spread - dense).norm() < 0.8 * (plain - dense).norm()
    for kind in (0, 1):
        exact, read = (layers[i].read(kind, tables[i], interleaved) for i in (0, 2))
        torch.testing.assert_close(read[:, :, :4], exact[:, :, :4], atol=1e-4, rtol=1e-4)
        assert (read - exact).norm() < 0.25 * exact.norm()


def test_error_falls_with_bits():
    q, k, v = qkv(1, 4, 2, 400)
    dense = feed(DenseLayer(), q, k, v, [399, 1])
    layers = [QuantizedLayer.data_free(bits) for bits in (2, 3, 4, 8)]
    errors = [(feed(x, q, k, v, [399, 1]) - dense)[:, :, -1].norm().item() for x in layers]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("make", [DenseLayer, lambda: QuantizedLayer.data_free(4)])
@pytest.mark.parametrize("draft", [5, 32])
def test_undoing_a_step_equals_never_making_it(make, draft):
    q, k, v = qkv(1, 4, 2, 260)
    rotation = angles(260)
    kept, cut = make(), make()
    kept_table, cut_table = RotationTable(), RotationTable()
    start = 130
    for layer, table in ((kept, kept_table), (cut, cut_table)):
        feed(layer, q, k, v, [start], table, rotation)
    for rows in (1, 7, 20, 30, 40, 31, 1):
        feed(cut, *qkv(1, 4, 2, draft, seed=9), [draft], cut_table, angles(draft, seed=8))
        CacheState([cut], [cut_table]).truncate(start)
        part = slice(start, start + rows)
        rest, tail = [x[:, :, part] for x in (q, k, v)], [x[:, part] for x in rotation]
        out = feed(cut, *rest, [rows], cut_table, tail)
        assert torch.equal(out, feed(kept, *rest, [rows], kept_table, tail))
        start += rows


def test_quantized_truncate_limits():
    q, k, v = qkv(1, 4, 2, 160)
    layer, exact = QuantizedLayer.data_free(4), DenseLayer()
    table = RotationTable()
    state = CacheState([exact, layer], [table])
    rotation = angles(160)
    feed(layer, q, k, v, [160], table, rotation)
    exact.append(k, v)
    assert layer.floor == 68
    with pytest.raises(ValueError, match="at least 68"):
        layer.truncate(67)
    with pytest.raises(ValueError, match="at least 68"):
        state.truncate(67)
    assert exact.length == table.length == state.length == 160
    with pytest.raises(ValueError, match="length 160"):
        state.truncate(161)
    state.truncate(68)
    assert layer.length == exact.length == table.length == 68
    state.truncate(0)
    assert layer.length == 0 and state.length == 0
    out = feed(layer, q, k, v, [3, 40], table, rotation)
    layer.truncate(2)
    table.truncate(2)
    rest = [x[:, :, 2:43] for x in (q, k, v)]
    again = feed(layer, *rest, [41], table, [x[:, 2:43] for x in rotation])
    torch.testing.assert_close(again, out[:, :, 2:], **TOLERANCE)


@pytest.mark.parametrize("make", [DenseLayer, lambda: QuantizedLayer.data_free(4)])
def test_reorder(make):
    q, k, v = qkv(3, 4, 2, 140)
    index = torch.tensor([2, 0, 0, 1])
    rotation = tuple(torch.cat([x, x.flip(1), -x]) for x in angles(140))
    table, other = RotationTable(), RotationTable()
    state = CacheState([make()], [table])
    feed(state.layers[0], q, k, v, [139], table, rotation)
    state.reorder(index)
    picked = [x[index] for x in (q, k, v)]
    turned = [x[index] for x in rotation]
    expected = feed(make(), *picked, [139, 1], other, turned)[:, :, -1:]
    last = [x[:, :, -1:] for x in picked]
    out = feed(state.layers[0], *last, [1], table, [x[:, -1:] for x in turned])
    torch.testing.assert_close(out, expected, **TOLERANCE)


def test_shared_table_survives_reorder_and_wider_rows():
    table = RotationTable()
    cos, sin = angles(5)
    table.append(cos, sin)
    table.reorder(torch.tensor([0, 0]))
    assert table.rows(0, 5)[0].shape == (1, 5, 8)
    table.append(cos.expand(2, -1, -1), sin.expand(2, -1, -1))
    table.append(cos[:, :1], sin[:, :1])
    expected = torch.cat([cos, cos, cos[:, :1]], 1).expand(2, -1, -1)
    assert torch.equal(table.rows(0, 11)[0], expected)
    assert table.nbytes == 2 * 2 * 256 * 8 * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_rotations_replace_the_exact_ones_at_the_next_append(layout):
    table, (cos, sin) = RotationTable(), angles(300)
    table.append(cos[:, :299], sin[:, :299])
    table.packed(4, 3, 10, layout)
    packed = table.packed(4, 6, 10, layout)
    assert torch.equal(table.rows(0, 299)[0], cos[:, :299])
    table.append(cos[:, 299:], sin[:, 299:])
    for turn, found in zip((cos, sin), unpack_table(packed, layout), strict=True):
        torch.testing.assert_close(found[..., :8], turn[:, 4:196], atol=5e-4, rtol=0)
    assert torch.equal(unpack_table(packed, layout)[0][..., 8:], torch.ones(1, 192, 2))
    assert table.length == 300 and torch.equal(table.rows(196, 300)[1], sin[:, 196:])
    table.truncate(210)
    assert table.length == 210 and torch.equal(table.rows(196, 210)[1], sin[:, 196:210])
    with pytest.raises(ValueError, match="length 210"):
        table.truncate(211)
    table.reset()
    assert table.length == table.nbytes == 0


def test_padding_follows_the_sink_of_its_row():
    """Rows of a left-padded batch are quantized as they would be alone."""
    inputs, (cos, sin), pad = qkv(1, 4, 2, 300), angles(300), 64
    layer, table, alone = QuantizedLayer.data_free(2, outliers=0.05), RotationTable(), []
    for part in (slice(0, 290), slice(290, 300)):
        table.append(cos[:, part], sin[:, part])
        alone.append(layer.step(*(x[:, :, part] for x in inputs), table))
    rows = [torch.cat((torch.randn(1, x.shape[1], pad, 16), x), 2) for x in inputs]
    q, k, v = (torch.cat((x, torch.randn_like(x))) for x in rows)
    valid = torch.ones(2, pad + 300)
    valid[0, :pad] = 0
    layer, table, padded = QuantizedLayer.data_free(2, outliers=0.05), RotationTable(), []
    for part in (slice(0, pad + 290), slice(pad + 290, pad + 300)):
        turn = (F.pad(x, (0, 0, pad, 0), value=1.0)[:, part] for x in (cos, sin))
        table.append(*turn)
        mask = causal_mask(valid, part.stop - part.start, part.stop, part.start, 0, 2)
        step = (x[:, :, part] for x in (q, k, v))
        padded.append(layer.step(*step, table, mask)[:1, :, -300:])
    torch.testing.assert_close(padded[0][:, :, -290:], alone[0], **TOLERANCE)
    torch.testing.assert_close(padded[1], alone[1], **TOLERANCE)
    keys = layer.read(0, table)
    assert keys.shape == (2, 2, pad + 300, 16)
    exact = rotate(inputs[1][:, :, :4], cos[:, :4], sin[:, :4])
    torch.testing.assert_close(keys[:1, :, pad : pad + 4], exact)


def test_quantized_memory_at_8k():
    """SmolLM2's shapes: 3 heads of 64 and 30 layers that share one rotation table."""
    torch.manual_seed(0)
    layer, table, shares = QuantizedLayer.data_free(4), RotationTable(), []
    for rows in [7492] + [1] * 72:
        x = torch.randn(1, 3, rows, 64)
        table.append(torch.rand(1, rows, 32), torch.rand(1, rows, 32))
        layer.step(x, x, x, table)
        shares.append((30 * layer.nbytes + table.nbytes) / (30 * layer.length * 2 * 2 * 3 * 64))
    assert layer.length == 7564
    assert max(shares) <= 0.305 and sum(shares) / len(shares) <= 0.295


def test_quantized_rejects_bad_head_size():
    q, k, v = qkv(1, 2, 2, 4, 12)
    with pytest.raises(ValueError, match="multiples of 8"):
        QuantizedLayer.data_free(4).step(q, k, v)
