"""Language models of other exporters: passes find in them what they find in captured ones."""

import pytest
import torch

import regraft
from tests.conftest import tiny
from tests.frontends.onnx.exporters import (
    HEADS,
    MICROSOFT,
    PAST,
    SIZE,
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


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_exports_of_onnxruntime_genai(model_type, tmp_path, batch):
    """gemma2's sliding layers have caches of the window's size, which only genai itself keeps."""
    changes = {"sliding_window": 24} if model_type == "gemma2" else {}
    model = tiny(model_type, eos_token_id=2, **changes)
    folder = by_genai(model, tmp_path / "out", "fp32")
    compiled = regraft.compile(folder, target="reference")
    check_raised(compiled, 2)
    if model_type != "gemma2":
        check_greedy(compiled, folder)
    check_quantized(folder, compiled, like=model)
    want = model.generate(**batch, **MADE)
    assert torch.equal(compiled.generate(**batch, **MADE), want)


def test_four_bit_weights_of_onnxruntime_genai(llama, tmp_path):
    """onnxruntime rounds activations to eight bits before it multiplies."""
    folder = by_genai(llama, tmp_path / "out", "int4")
    compiled = regraft.compile(folder, target="reference")
    check_raised(compiled, 2)
    want, got = (one(IDS[:, :60]).logits for one in (regraft.load(folder), compiled))
    assert (want - got).abs().max() < 0.03 * want.abs().max()
    check_quantized(folder, compiled)


ATTENDED = {
    "grouped": grouped(),
    "packed": grouped(packed=True),
    "interleaved": grouped(rotary_interleaved=1),
    "softcap": grouped(softcap=3.0, scale=0.5),
    "window": grouped(local_window_size=20),
    "sinks": grouped(sinks=True),
    "smooth": grouped(smooth_softmax=1),
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


def test_normalised_heads(tmp_path):
    """onnxruntime has them on other devices alone: those of the node are those before it."""

    def before(g, x):
        q, k, v = (g.product(x, n * SIZE) for n in (HEADS, 2, 2))
        tables, norms = g.tables(), []
        for t in (q, k):
            rows = g.op("Reshape", t, g.held([0, 0, -1, SIZE]))
            rows = g.op("RMSNormalization", rows, g.weight(SIZE), epsilon=1e-6)
            norms.append(g.op("Reshape", rows, g.held([0, 0, -1])))
        return g.op(
            "GroupQueryAttention", *norms, v, *PAST, *g.counts(), *tables, outputs=3,
            domain=MICROSOFT, num_heads=HEADS, kv_num_heads=2, do_rotary=1,
        )  # fmt: skip

    made = []
    for name, attend in (("node", grouped(norms=True)), ("before", before)):
        folder = Graph().save(tmp_path / name, attend)
        made.append(regraft.compile(folder, target="reference"))
        check_raised(made[-1], 1)
    want, got = (stepwise(compiled)[0] for compiled in made)
    assert (want - got).abs().max() < 1e-5 * want.abs().max()


def test_a_mask_of_its_own_stays(tmp_path):
    """What is added to scores is more than a mask."""

    def attend(g, x):
        q, k, v = (g.product(x, n) for n in (64, 32, 32))
        bias = g.op("Mul", g.bias(), g.weight(1, 1, 1, 1))
        keys = g.op("Cast", g.op("Unsqueeze", "attention_mask", g.held([1, 2])), to=1)
        bias = g.op("Add", bias, g.op("Mul", keys, g.weight(1, HEADS, 1, 1)))
        return g.op("Attention", q, k, v, bias, *PAST, outputs=3, q_num_heads=4, kv_num_heads=2)

    folder = Graph().save(tmp_path / "out", attend)
    compiled = regraft.compile(folder, target="reference")
    (node,) = attention(compiled)
    assert node.args[5].target is not ops.causal_mask.default
    row = next(row for row in compiled.report.rows if row.name == "RaiseMask")
    assert row.skipped[0][1] == "its mask is more than causal"
    check_greedy(compiled, folder)
