import pytest
import torch
from transformers import LogitsProcessorList, MinLengthLogitsProcessor

import regraft
from regraft.program import RegraftError


@pytest.fixture(scope="module")
def compiled(llama):
    return regraft.compile(llama)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str
)
def test_generate_equals_eager(llama, compiled, batch, options):
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    assert torch.equal(llama.generate(**batch, **options), compiled.generate(**batch, **options))


def test_sampling_equals_eager(llama, compiled, batch):
    outputs = []
    for model in (llama, compiled):
        torch.manual_seed(0)
        outputs.append(model.generate(**batch, max_new_tokens=8, do_sample=True, top_k=20))
    assert torch.equal(*outputs)


def test_logits_processor_and_streamer(compiled, batch):
    class Streamer:
        tokens = 0

        def put(self, value):
            self.tokens += 1

        def end(self):
            self.ended = True

    streamer = Streamer()
    processors = LogitsProcessorList([MinLengthLogitsProcessor(20, 5)])
    one = {name: value[1:] for name, value in batch.items()}
    compiled.generate(
        **one, max_new_tokens=4, do_sample=False, logits_processor=processors, streamer=streamer
    )
    assert streamer.tokens == 5 and streamer.ended


def test_eight_bit_cache_follows_dense(llama, compiled):
    coded = regraft.compile(llama, [regraft.KVQuant(bits=8, tail=16, group=32)])
    ids = torch.randint(3, 256, (1, 400))
    dense_cache, coded_cache = compiled.new_cache(), coded.new_cache()
    for start in range(0, 400, 25):
        part = ids[:, start : start + 25]
        dense = compiled(part, past_key_values=dense_cache).logits
        quantised = coded(part, past_key_values=coded_cache).logits
    assert coded_cache.nbytes < 0.5 * dense_cache.nbytes
    assert (dense - quantised).abs().max() < 0.02 * dense.abs().max()
    rough = regraft.compile(llama, [regraft.KVQuant(bits=2, tail=16, group=32)])
    rough_cache = rough.new_cache()
    for start in range(0, 400, 25):
        worst = rough(ids[:, start : start + 25], past_key_values=rough_cache).logits
    assert (dense - worst).abs().max() > (dense - quantised).abs().max()


def test_rejected_drafts_leave_a_coded_cache_as_close(llama, compiled):
    coded = regraft.compile(llama, [regraft.KVQuant(bits=8, tail=16, group=32)])
    ids = torch.randint(3, 256, (1, 200))
    dense = compiled(ids).logits
    cache, length = coded.new_cache(), 0
    while length < 200:
        drafts = torch.randint(3, 256, (1, 6))
        right = min(2, 200 - length)
        drafts[:, :right] = ids[:, length : length + right]
        logits = coded(drafts, past_key_values=cache).logits[:, :right]
        cache.crop(length + right)
        error = (dense[:, length : length + right] - logits).abs().max()
        assert error < 0.02 * dense.abs().max()
        length += right
    assert cache.state.length == 200 and cache.state.layers[0].floor > 100


def test_short_context_is_exact_with_codes(llama, compiled, batch):
    coded = regraft.compile(llama, [regraft.KVQuant(bits=2)])
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(compiled.generate(**batch, **options), coded.generate(**batch, **options))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": [[1, 2], [3]]}, "must be an integer tensor"),
        ({"input_ids": torch.ones(2, 3)}, "must be an integer tensor"),
        ({"input_ids": torch.ones(3, dtype=torch.long)}, "dimensions"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, "empty"),
        ({"input_ids": torch.ones(1, 600, dtype=torch.long)}, "limit of 512"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long), "tokens": 1}, "unknown input tokens"),
        (
            {
                "input_ids": torch.ones(1, 3, dtype=torch.long),
                "attention_mask": torch.ones(1, 4, dtype=torch.long),
            },
            "attention_mask must be",
        ),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long, device="meta")}, "is on meta, the model"),
        (
            {
                "input_ids": torch.ones(1, 3, dtype=torch.long),
                "attention_mask": torch.ones(1, 3, dtype=torch.long, device="meta"),
            },
            "attention_mask is on meta, the model",
        ),
    ],
)
def test_bad_input_gives_one_clear_error(compiled, inputs, message):
    with pytest.raises(RegraftError, match=message):
        compiled(**inputs)


def test_compile_refuses_what_it_cannot_take():
    with pytest.raises(RegraftError, match="cannot compile a Linear"):
        regraft.compile(torch.nn.Linear(2, 2))


def test_to_refuses_another_device_or_dtype(compiled):
    assert compiled.to("cpu") is compiled and compiled.to(torch.float32) is compiled
    assert compiled.to(device=torch.device("cpu"), dtype=torch.float32) is compiled
    for target in ("meta", torch.float16):
        with pytest.raises(RegraftError, match="compiled for cpu and torch.float32"):
            compiled.to(target)
