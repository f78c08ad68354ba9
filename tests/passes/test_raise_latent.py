import pytest
import torch

import regraft
from regraft.passes import CleanUp, Context, KVQuant, RaiseAttention, RaiseLatent, run
from tests.conftest import tiny
from tests.passes.tracing import count, inputs, program_of

ops = torch.ops.regraft
HEADS, LATENT, ROPE, PLAIN, VALUE = 4, 16, 8, 12, 10
SHAPES = (("b", HEADS, "s", PLAIN + ROPE), ("b", 1, "s", LATENT), ("b", 1, "s", ROPE),
          ("b", 1, "s", "t"), ("b", 1, "p", LATENT), ("b", 1, "p", ROPE))  # fmt: skip
WEIGHT = torch.randn(HEADS * (PLAIN + VALUE), LATENT, generator=torch.Generator().manual_seed(3))


def latent_attention(q, c, r, mask, past_c, past_r, change=lambda x: x, front=False):
    c, r = ops.kv_update(past_c, c), ops.kv_update(past_r, r)
    batch, _, length, _ = c.shape
    expanded = torch.nn.functional.linear(change(c), WEIGHT)
    expanded = expanded.view(batch, length, HEADS, -1).transpose(1, 2)
    plain, v = expanded.split([PLAIN, VALUE], -1)
    k = plain.new_empty(batch, HEADS, length, PLAIN + ROPE)
    if front:
        k[..., :ROPE] = r.expand(-1, HEADS, -1, -1)
        k[..., ROPE:] = plain
    else:
        k[..., :PLAIN] = plain
        k[..., PLAIN:] = r.expand(-1, HEADS, -1, -1)
    return ops.attention(q, k, v, mask, None, 0.3, 0.0), c, r


@pytest.mark.parametrize("front", [False, True])
def test_projections_are_absorbed(front):
    def function(*given):
        return latent_attention(*given, front=front)

    program = program_of(function, *SHAPES)
    report = run(program, [CleanUp(), RaiseLatent(), RaiseAttention()], Context())
    assert [row.matches for row in report.rows[1:]] == [1, 1]
    assert count(program, torch.ops.aten.linear.default) == 0
    assert [spec.shape[-1] for spec in program.inputs[-2:]] == [LATENT + ROPE, LATENT]
    assert [spec.shape[-1] for spec in program.outputs[-2:]] == [LATENT + ROPE, LATENT]
    q, c, r, mask, past_c, past_r = given = inputs(*SHAPES, batch=3, queries=1, past=12)
    out, key, value = program(q, c, r, mask, torch.cat([past_c, past_r], -1), past_c)
    expected, all_c, all_r = function(*given)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(key, torch.cat([all_c, all_r], -1))
    torch.testing.assert_close(value, all_c)


@pytest.mark.parametrize("change", [torch.relu, lambda c: c.flip(2), lambda c: c + 1])
def test_keys_that_are_no_linear_function_of_their_token_stay(change):
    def function(*given):
        return latent_attention(*given, change=change)

    program = program_of(function, *SHAPES)
    report = run(program, [CleanUp(), RaiseLatent()], Context())
    assert report.rows[1].matches == 0
    assert "no linear functions" in report.rows[1].skipped[0][1]


@pytest.mark.parametrize("name, style", [("deepseek_v3", "half"), ("deepseek_v2", "interleaved")])
def test_latent_models_hold_one_head_before_rotation(name, style, batch):
    sizes = dict(q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
                 v_head_dim=16, num_key_value_heads=4, head_dim=8,
                 first_k_dense_replace=2, num_hidden_layers=1)  # fmt: skip
    model = tiny(name, **sizes)
    compiled = regraft.compile(model, target="reference")
    target = ops.cached_attention.default
    nodes = compiled.program.graph.find_nodes(op="call_function", target=target)
    assert len(nodes) == 1
    for node in nodes:
        assert node.args[6] is not None and node.args[11:] == (style, 16)
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def check(compiled, ids, mask, first, tolerance):
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            expected = model(ids, attention_mask=mask, position_ids=positions).logits
        cache = compiled.new_cache()
        start = compiled(ids[:, :first], mask[:, :first], past_key_values=cache).logits
        rest = compiled(ids[:, first:], mask, past_key_values=cache).logits
        error = (torch.cat([start, rest], 1) - expected)[mask.bool()].abs().max()
        assert error <= tolerance * expected.abs().max()

    check(compiled, ids, mask, 6, 1e-5)
    quantized = regraft.compile(
        model, [KVQuant(bits=8, sink=0, tail=1, group=32)], target="reference"
    )
    ids = torch.randint(3, 100, (2, 48), generator=torch.Generator().manual_seed(0))
    check(quantized, ids, torch.ones_like(ids), 40, 0.05)
