import pytest
import torch

from regraft.benchmarks import kv_modes, kv_quality
from regraft.frontends.huggingface import capture
from regraft.passes import DEFAULT, Context, run
from regraft.passes.calibrate import collect
from tests.conftest import tiny


@pytest.fixture(scope="module")
def sharp():
    """A model whose attention and output depend on what it caches."""
    return tiny("llama", initializer_range=0.15)


@pytest.fixture(scope="module")
def measured(sharp):
    program = capture(sharp)
    run(program, DEFAULT, Context())
    target = torch.ops.regraft.cached_attention.default
    nodes = program.graph.find_nodes(op="call_function", target=target)
    generator = torch.Generator().manual_seed(0)
    text = [torch.randint(3, 256, (1, 300), generator=generator) for _ in range(2)]
    samples = collect(program, nodes, text, kv_quality.SINK, print)
    modes = kv_quality.modes(samples, kv_quality.BITS)
    modes = [mode for mode in modes if not mode.name.startswith("QuantizedCache")]
    return text, modes, kv_quality.measure(program, nodes, modes, text[:1])


def test_dense_loss_is_the_models_own(sharp, measured):
    (ids, _), _, totals = measured
    with torch.no_grad():
        loss = sharp(ids, labels=ids).loss.item()
    assert totals["dense"].loss / totals["dense"].tokens == pytest.approx(loss, rel=1e-5)
    assert totals["dense"].divergence == 0


def test_more_bits_and_outliers_diverge_less(measured):
    _, modes, totals = measured
    for name in ("uniform (KIVI) {}-bit", "rotated {}-bit", "nuq {}-bit", "nuq {}-bit + 1 %"):
        four, three, two = (totals[name.format(bits)].divergence for bits in (4, 3, 2))
        assert 0 < four < three < two
    for bits in (4, 3, 2):
        plain, outliers = (totals[f"nuq {bits}-bit{x}"].divergence for x in ("", " + 1 %"))
        assert outliers < plain


def test_mixed_stays_within_its_budget(measured):
    _, modes, _ = measured
    mixed = next(mode for mode in modes if mode.name == "nuq mixed")
    assert kv_quality.BUDGET - 0.3 < mixed.bits <= kv_quality.BUDGET


def test_rows_and_checks(measured):
    _, modes, totals = measured
    rows = kv_quality._rows(2048, modes, totals)
    assert rows[0]["model"] == "dense" and rows[0]["ratio"] == 1 and rows[0]["kl"] == 0
    checks = {check.name: check for check in kv_quality.checks(rows)}
    assert checks["nuq mixed: effective bits"].holds
    worse = [{**row, "ratio": 2.0} for row in rows]
    assert not any(c.holds for c in kv_quality.checks(worse) if "perplexity" in c.name)


def test_curve_is_read_between_its_points():
    curve = [(2.0, 0.0), (3.0, -1.0), (4.0, -3.0)]
    assert [kv_quality._at(curve, x) for x in (2.5, 3.5, 5.0)] == [-0.5, -2.0, -5.0]


def test_turned_keys_come_back_unrotated():
    angles = torch.rand(1, 9, 4)
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    identity = kv_modes.Mode("exact", 16, [(lambda x: x, lambda x: x)], turned=True)
    (edit,) = identity.edits([object()], 2).values()
    rest = (None, None, None, angles.cos(), angles.sin(), None, 1.0, 0.0, "half", 0)
    out = edit(q, k, v, *rest)
    torch.testing.assert_close(out[1], k)
    assert torch.equal(out[2], v) and out[3:] == rest
