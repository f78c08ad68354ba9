"""Language models of other exporters: passes find in them what they find in captured ones."""

import pytest
import torch

import regraft
from tests.conftest import tiny
from tests.frontends.onnx.exporters import (
    HEADS,
    Graph,
    by_genai,
    by_torch,
    grouped,
    multi_head,
    standard,
)

ops = torch.ops.regraft
MADE = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
IDS = torch.randint(3, 256, (2, 200), generator=torch.Generator().manual_seed(2))


def attention(compiled):
    return compiled.program.graph.find_nodes(
        op="call_function", target=ops.cached_attention.default
    )


def check_raised(compiled, layers, rotated=True):
    """Each layer is one operator with a causal mask, and keys before rotation."""
    nodes = attention(compiled)
    assert len(nodes) == len(compiled.program.cache.layers) == layers
    assert all(node.args[5].target is ops.causal_mask.default for node in nodes)
    assert all((node.args[6] is not None) == rotated for node in nodes)
    row = next(row for row in compiled.report.rows if row.name == "RaiseAttention")
    assert row.matches == layers


def check_greedy(compiled, folder):
    """The text of onnxruntime, behind a prompt and in a batch."""
    runtime = regraft.load(folder)
    for ids in (IDS[:1, :9], IDS[:, :40]):
        mask = torch.ones_like(ids)
        want = runtime.generate(ids, attention_mask=mask, **MADE)
        assert torch.equal(compiled.generate(ids, attention_mask=mask, **MADE), want)


def stepwise(compiled):
    """Logits of the last token behind a prompt, several tokens and one, and the cache."""
    cache = compiled.new_cache()
    for part in (IDS[:, :150], IDS[:, 150:199], IDS[:, 199:]):
        logits = compiled(part, past_key_values=cache).logits[:, -1]
    return logits, cache


def check_quantized(folder, dense, bound=0.1, like=None):
    """With 4 bits near the dense cache, and equal to what a captured model computes with them."""
    passes = [regraft.KVQuant(bits=4)]
    quantized = regraft.compile(folder, passes, target="reference")
    got, cache = stepwise(quantized)
    assert all(layer.blocks for layer in cache.state.layers)
    want, _ = stepwise(dense)
    error = (want - got).abs().max() / want.abs().max()
    assert 0 < error < bound
    if like is not None:
        want, _ = stepwise(regraft.compile(like, passes, target="reference"))
        assert (want - got).abs().max() < 1e-3 * want.abs().max()
    made = quantized.generate(IDS[:, :9], **MADE)
    assert made.shape == (2, 9 + MADE["max_new_tokens"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"places": False},
        {"opset": 23},
        {"dynamo": False},
        {"dynamo": False, "places": False},
    ],
    ids=str,
)
def test_exports_of_torch(llama, tmp_path, settings):
    folder = by_torch(llama, tmp_path / "out", **settings)
    compiled = regraft.compile(folder, target="reference")
    check_raised(compiled, 2)
    check_greedy(compiled, folder)
    check_quantized(folder, compiled, like=llama)


@pytest.mark.parametrize("settings", [{"functions": False}, {"contrib": True}], ids=str)
def test_plain_exports_of_our_own(llama, tmp_path, batch, settings):
    folder = tmp_path / "out"
    regraft.compile(llama, target="reference").export_onnx(folder, **settings)
    compiled = regraft.compile(folder, target="reference")
    check_raised(compiled, 2)
    check_greedy(compiled, folder)
    check_quantized(folder, compiled, like=llama)
    want = llama.generate(**batch, **MADE)
    assert torch.equal(compiled.generate(**batch, **MADE), want)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_exports_of_onnxruntime_genai(model_type, precision, tmp_path, batch):
    if precision == "int4" and model_type != "llama":
        pytest.skip("one model of four-bit weights is enough")
    changes = {"sliding_window": 24} if model_type == "mistral" else {}
    model = tiny(model_type, eos_token_id=2, **changes)
    folder = by_genai(model, tmp_path / "out", precision)
    compiled = regraft.compile(folder, target="reference")
    check_raised(compiled, 2)
    check_greedy(compiled, folder)
    check_quantized(folder, compiled, like=model if precision == "fp32" else None)
    if precision == "fp32":
        want = model.generate(**batch, **MADE)
        assert torch.equal(compiled.generate(**batch, **MADE), want)


ATTENDED = {
    "grouped": grouped(),
    "packed": grouped(packed=True),
    "interleaved": grouped(rotary_interleaved=1),
    "softcap": grouped(softcap=3.0, scale=0.5),
    "window": grouped(local_window_size=20),
    "sinks": grouped(sinks=True),
    "smooth": grouped(smooth_softmax=1),
    "norms": grouped(norms=True),
    "without rotation": grouped(rotary=False),
    "heads": multi_head,
    "standard": standard(),
    "standard, interleaved": standard(interleaved=1),
    "standard, softcap": standard(softcap=3.0, scale=0.5),
}


@pytest.mark.parametrize("kind", ATTENDED)
def test_operators_with_a_cache(kind, tmp_path):
    shared = HEADS if kind == "heads" else 2
    places = kind.startswith("standard")
    folder = Graph().save(tmp_path / "out", ATTENDED[kind], shared=shared, places=places)
    compiled = regraft.compile(folder, target="reference")
    check_raised(compiled, 1, rotated=kind != "without rotation")
    check_greedy(compiled, folder)
    check_quantized(folder, compiled)


def test_padding_on_the_right_is_what_the_node_serves(tmp_path):
    """onnxruntime writes over padding on the right; a program hides it."""
    folder = Graph().save(tmp_path / "out", grouped())
    ids, mask = IDS[:, :9], torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    runtime = regraft.load(folder)(ids, attention_mask=mask).logits
    program = regraft.compile(folder, target="reference")(ids, attention_mask=mask).logits
    seen = mask.bool()
    assert (runtime - program)[seen].abs().max() < 1e-5 * runtime[seen].abs().max()


def test_a_mask_of_its_own_stays(tmp_path):
    """A bias that is no mask, and a window that is not the causal one."""

    def attend(g, x):
        q, k, v = (g.product(x, n) for n in (64, 32, 32))
        bias = g.op("Mul", g.bias(), g.weight(1, 1, 1, 1))
        keys = g.op("Cast", g.op("Unsqueeze", "attention_mask", g.held([1, 2])), to=1)
        bias = g.op("Add", bias, g.op("Mul", keys, g.weight(1, HEADS, 1, 1)))
        past = "past_key_values.0.key", "past_key_values.0.value"
        return g.op("Attention", q, k, v, bias, *past, outputs=3, q_num_heads=4, kv_num_heads=2)

    folder = Graph().save(tmp_path / "out", attend)
    compiled = regraft.compile(folder, target="reference")
    (node,) = attention(compiled)
    assert node.args[5].target is not ops.causal_mask.default
    row = next(row for row in compiled.report.rows if row.name == "RaiseMask")
    assert row.skipped[0][1] == "its mask is more than causal"
    check_greedy(compiled, folder)
