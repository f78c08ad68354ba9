"""transformers' own decode loop under co-execution."""

import pytest
import torch

import regraft
from tests.conftest import tiny

NEW = 12
REPLAY = {"backend": "replay", "measure": False}


@pytest.fixture(scope="module")
def prompt():
    ids = torch.randint(3, 256, (1, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW}


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 20}])
def test_a_block_generates_the_same_text_with_a_wait_a_token(llama, prompt, options):
    torch.manual_seed(3)
    expected = [llama.generate(**prompt, **options) for _ in range(3)]
    torch.manual_seed(3)
    with regraft.coexecution() as report:
        for want in expected:
            before = report().fetches
            assert torch.equal(llama.generate(**prompt, **options), want)
    now = report()
    assert now.symbolic > 0.7 and now.deferred > 1000
    waits = sum(count - before.get(line, (0, 0))[0] for line, (count, _) in now.fetches.items())
    tokens = expected[-1].shape[1] - prompt["input_ids"].shape[1]
    assert waits <= 2 * tokens + 6  # the end of the text is asked for at each token
    assert not any("raised" in reason for reason in now.fallbacks)


def test_beams_and_batches_padded_on_the_left(llama, batch):
    options = dict(max_new_tokens=NEW, do_sample=False, num_beams=3)
    expected = llama.generate(**batch, **options)
    generate = regraft.coexecute(llama.generate, **REPLAY)
    for _ in range(3):
        assert torch.equal(generate(**batch, **options), expected)
    assert generate.report().symbolic > 0.6


def test_a_compiled_model_generates_the_same_text(prompt):
    fast = regraft.compile(tiny("llama"))
    expected = fast.generate(**prompt, do_sample=False)
    with regraft.coexecution() as report:
        for _ in range(2):
            assert torch.equal(fast.generate(**prompt, do_sample=False), expected)
    assert report().deferred
