import pytest
import torch

import regraft
from regraft.passes import CleanUp, Context, RaiseAttention, RaiseSoftmax, run
from tests.conftest import tiny
from tests.passes.tracing import count, inputs, program_of

aten, ops = torch.ops.aten, torch.ops.regraft
update = ops.kv_update
HEADS, SIZE = 4, 8


def shapes(kv_heads=HEADS):
    cached = ("b", kv_heads, "p", SIZE)
    new = ("b", kv_heads, "s", SIZE)
    return ("b", HEADS, "s", SIZE), new, new, ("b", 1, "s", "t"), cached, cached


def by_matmul(q, k, v, mask, past_k, past_v):
    key, value = update(past_k, k), update(past_v, v)
    scores = q @ key.transpose(-1, -2) / 3.0 + mask
    return torch.softmax(scores, -1) @ value, key, value


def by_baddbmm(q, k, v, mask, past_k, past_v):
    key, value = update(past_k, k), update(past_v, v)
    batch, length = q.shape[0], q.shape[2]
    rows = [x.reshape(batch * HEADS, -1, SIZE) for x in (q, key, value)]
    bias = mask[:, :, :1].expand(batch, HEADS, 1, key.shape[2]).reshape(batch * HEADS, 1, -1)
    scores = bias.baddbmm(rows[0], rows[1].transpose(1, 2), beta=0.5, alpha=0.2)
    weights = torch.softmax(scores.view(batch, HEADS, length, -1) + mask, -1, torch.float32)
    out = torch.bmm(weights.view(batch * HEADS, length, -1), rows[2])
    return out.view(batch, HEADS, length, SIZE), key, value


def by_groups(q, k, v, mask, past_k, past_v):
    key, value = update(past_k, k), update(past_v, v)
    batch, heads, length, size = key.shape
    k, v = (
        x[:, :, None].expand(batch, heads, HEADS // heads, length, size)
        .reshape(batch, HEADS, length, size)
        for x in (key, value)
    )  # fmt: skip
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3
    scores = scores.masked_fill(mask > 1, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1) @ v, key, value


def by_softcap(q, k, v, mask, past_k, past_v):
    key, value = update(past_k, k), update(past_v, v)
    scores = torch.tanh(q @ key.transpose(-1, -2) * 0.5 / 20.0) * 20.0
    return torch.softmax(scores + mask, -1) @ value, key, value


def fused(q, k, v, mask, past_k, past_v):
    key, value = update(past_k, k), update(past_v, v)
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(q, key, value, attn_mask=mask, scale=0.7), key, value


SPELLINGS = {
    "matmul": (by_matmul, HEADS, 1 / 3, 0.0),
    "baddbmm": (by_baddbmm, HEADS, 0.2, 0.0),
    "groups": (by_groups, 2, 0.3, 0.0),
    "softcap": (by_softcap, HEADS, 0.5, 20.0),
    "fused": (fused, HEADS, 0.7, 0.0),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_each_spelling_becomes_one_node_that_is_equal_at_other_sizes(name):
    function, kv_heads, scale, softcap = SPELLINGS[name]
    program = program_of(function, *shapes(kv_heads))
    report = run(program, [CleanUp(), RaiseSoftmax()], Context())
    assert report.rows[1].matches == 1
    (node,) = program.graph.find_nodes(op="call_function", target=ops.attention.default)
    assert node.args[5] == pytest.approx(scale, rel=1e-4)
    assert node.args[6] == pytest.approx(softcap, rel=1e-4)
    for target in (aten.softmax.int, aten.scaled_dot_product_attention.default):
        assert count(program, target) == 0
    run(program, [RaiseAttention()], Context())
    assert count(program, ops.cached_attention.default) == 1
    given = inputs(*shapes(kv_heads), batch=3, queries=1, past=12)
    for got, expected in zip(program(*given), function(*given), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def changed_weights(q, k, v, mask, past_k, past_v):
    key, value = update(past_k, k), update(past_v, v)
    weights = torch.softmax(q @ key.transpose(-1, -2) + mask, -1)
    return weights.relu() @ value, key, value


def swapped_heads(q, k, v, mask, past_k, past_v):
    key, value = update(past_k, k), update(past_v, v)
    k, v = (x.repeat(1, 2, 1, 1) for x in (key, value))
    return torch.softmax(q @ k.transpose(-1, -2) + mask, -1) @ v, key, value


def squared_scores(q, k, v, mask, past_k, past_v):
    key, value = update(past_k, k), update(past_v, v)
    return torch.softmax((q @ key.transpose(-1, -2)) ** 2 + mask, -1) @ value, key, value


@pytest.mark.parametrize(
    "function, kv_heads, reason",
    [
        (changed_weights, HEADS, "changes the attention weights"),
        (swapped_heads, 2, "not repeated in groups"),
        (squared_scores, HEADS, "not scaled and soft-capped"),
    ],
)
def test_what_is_not_this_attention_stays_and_says_why(function, kv_heads, reason):
    program = program_of(function, *shapes(kv_heads))
    report = run(program, [CleanUp(), RaiseSoftmax()], Context())
    assert report.rows[1].matches == 0
    assert reason in report.rows[1].skipped[0][1]
    assert count(program, aten.softmax.int) == 1


def test_a_softmax_after_attention_is_no_candidate():
    def routed(q, k, v, mask, past_k, past_v):
        out, key, value = by_matmul(q, k, v, mask, past_k, past_v)
        gates = torch.softmax(torch.nn.functional.linear(out, torch.eye(SIZE)), -1)
        return out * gates, key, value

    program = program_of(routed, *shapes())
    report = run(program, [CleanUp(), RaiseSoftmax()], Context())
    assert (report.rows[1].matches, report.rows[1].skipped) == (1, ())


def test_a_softmax_over_other_things_is_no_candidate():
    def router(x):
        return (torch.softmax(x @ x.transpose(-1, -2), -1) @ x,)

    program = program_of(router, ("b", "s", 8))
    report = run(program, [RaiseSoftmax()], Context())
    assert (report.rows[0].matches, report.rows[0].skipped) == (0, ())


@pytest.mark.parametrize("name", ["bloom", "gptj"])
def test_models_with_attention_of_their_own_are_raised(name, batch):
    model = tiny(name, n_embd=64, n_layer=2, n_head=4, rotary_dim=8)
    compiled = regraft.compile(model, target="reference")
    assert count(compiled.program, ops.cached_attention.default) == 2
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        extra = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if name == "gptj" else {}
        expected = model(ids, attention_mask=mask, **extra).logits[mask.bool()]
    cache = compiled.new_cache()
    first = compiled(ids[:, :6], mask[:, :6], past_key_values=cache).logits
    rest = compiled(ids[:, 6:], mask, past_key_values=cache).logits
    got = torch.cat([first, rest], 1)[mask.bool()]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
