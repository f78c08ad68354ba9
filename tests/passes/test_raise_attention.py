import torch

from regraft.passes import CleanUp, Context, KVQuant, RaiseAttention, run
from regraft.runtime.lower import lower, new_cache
from tests.passes.tracing import count, inputs, program_of

ops = torch.ops.regraft
update, attention = ops.kv_update, ops.attention
NEW, CACHED = ("b", 2, "s", 8), ("b", 2, "p", 8)
MASK = ("b", 1, "s", "t")


def raised(function, *shapes):
    program = program_of(function, *shapes)
    report = run(program, [CleanUp(), RaiseAttention()], Context())
    return program, report.rows[1]


def check(program, function, *shapes):
    given = inputs(*shapes, batch=3, queries=1, past=12)
    for got, expected in zip(program(*given), function(*given), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_later_layer_reads_the_cache_of_its_owner():
    def shared(q, k, v, mask, past_k, past_v):
        key, value = update(past_k, k), update(past_v, v)
        first = attention(q, key, value, mask, None, 0.3, 0.0)
        return attention(first, key, value, mask, None, 0.3, 0.0), key, value

    program, row = raised(shared, NEW, NEW, NEW, MASK, CACHED, CACHED)
    assert (row.matches, count(program, ops.cached_attention.default)) == (2, 1)
    assert count(program, ops.kv_update.default) == 0
    check(program, shared, NEW, NEW, NEW, MASK, CACHED, CACHED)
    check_lowered(program, shared)
    run(program, [KVQuant(bits=8, sink=1, tail=2, group=32)], Context())
    check_lowered(program, shared, steps=(40, 1), tolerance=0.03)


def test_a_mask_may_read_the_cached_values():
    def dynamic(q, k, v, mask, past_k, past_v):
        key, value = update(past_k, k), update(past_v, v)
        bias = value.sum(-1)[:, :, None] + mask
        return attention(q, key, value, bias, None, 0.3, 0.0), key, value

    program, row = raised(dynamic, NEW, NEW, NEW, MASK, CACHED, CACHED)
    assert row.matches == count(program, ops.cached_attention.default) == 1
    check(program, dynamic, NEW, NEW, NEW, MASK, CACHED, CACHED)
    check_lowered(program, dynamic)


def test_a_mask_that_reads_the_cached_keys_says_so_and_runs():
    def dynamic(q, k, v, mask, past_k, past_v):
        key, value = update(past_k, k), update(past_v, v)
        bias = key.sum(-1)[:, :, None] + mask
        return attention(q, key, value, bias, None, 0.3, 0.0), key, value

    program, row = raised(dynamic, NEW, NEW, NEW, MASK, CACHED, CACHED)
    assert row.matches == 0 and "read the cached keys" in row.skipped[0][1]
    check_lowered(program, dynamic)


def test_nodes_that_read_the_cache_before_attention_move_behind_it():
    def early(q, k, v, mask, past_k, past_v):
        key, value = update(past_k, k), update(past_v, v)
        mean = key.mean(2, keepdim=True)
        return attention(q, key, value, mask, None, 0.3, 0.0) + mean, key, value

    program, row = raised(early, NEW, NEW, NEW, MASK, CACHED, CACHED)
    assert row.matches == 1
    check(program, early, NEW, NEW, NEW, MASK, CACHED, CACHED)
    check_lowered(program, early)


def check_lowered(program, function, steps=(4, 1), tolerance=1e-4):
    """Two steps over the runtime's cache equal the function over concatenated tensors."""
    step, _ = lower(program)
    cache = new_cache(program.cache)
    past = [torch.zeros(2, 2, 0, 8)] * 2
    for queries in steps:
        shapes = (NEW, NEW, NEW, MASK)
        given = inputs(*shapes, queries=queries, past=past[0].shape[2])
        expected, *past = function(*given, *past)
        difference = (step(*given, cache) - expected).abs().max()
        assert difference <= tolerance * expected.abs().max()
