import pytest
import torch

import regraft
from regraft.frontends.huggingface import capture
from regraft.program import RegraftError
from tests.conftest import tiny

MODELS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4},
    "phi3": {},
    "stablelm": {"partial_rotary_factor": 0.25},
    "glm": {},
    "cohere": {},
    "gpt_neox": {},
    "olmo2": {},
}
INTERLEAVED = {"glm", "cohere"}


@pytest.mark.parametrize("name", MODELS)
def test_compiled_equals_eager_over_a_padded_batch(name, batch):
    model = tiny(name, **MODELS[name])
    compiled = regraft.compile(model)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    real = mask.bool()

    def eager(length):
        positions = (mask[:, :length].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            return model(
                input_ids=ids[:, :length],
                attention_mask=mask[:, :length],
                position_ids=positions,
                use_cache=False,
            ).logits

    scale = eager(9).abs().max()
    cache = compiled.new_cache()
    prefill = compiled(ids[:, :5], mask[:, :5], past_key_values=cache).logits
    assert (prefill - eager(5))[real[:, :5]].abs().max() <= 1e-5 * scale
    for length in (6, 7, 8):
        step = compiled(ids[:, length - 1 : length], mask[:, :length], past_key_values=cache)
        assert (step.logits[:, -1] - eager(length)[:, -1]).abs().max() <= 1e-5 * scale
    cache.crop(-2)
    verify = compiled(ids[:, 6:9], mask, past_key_values=cache).logits
    assert (verify - eager(9)[:, 6:]).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"gpt_neox"}))
def test_rotation_is_raised(name):
    program = regraft.compile(tiny(name, **MODELS[name])).program
    target = torch.ops.regraft.cached_attention.default
    nodes = program.graph.find_nodes(op="call_function", target=target)
    assert len(nodes) == 2
    for node in nodes:
        assert node.args[6] is not None
        assert node.args[11] == ("interleaved" if name in INTERLEAVED else "half")


def test_signature_uses_the_names_of_optimum(llama):
    program = capture(llama)
    names = [spec.name for spec in program.inputs]
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert names[4:6] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert [spec.name for spec in program.outputs][:2] == ["logits", "present.0.key"]


def test_capture_gives_the_model_back_as_it_was(llama):
    before = llama.config._attn_implementation
    capture(llama)
    assert llama.config._attn_implementation == before


def test_a_model_without_a_cache_says_so():
    with pytest.raises(RegraftError, match="keeps no cache"):
        regraft.compile(tiny("openai-gpt"), fallback="error")
