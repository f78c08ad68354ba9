import pytest
import torch

import regraft
from regraft.frontends.huggingface import capture
from regraft.frontends.states import Memory
from regraft.program import RegraftError, TensorSpec
from regraft.runtime.recurrent import RecurrentStates
from tests.conftest import tiny

LINEAR = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
)
MODELS = {
    "mamba": dict(state_size=8),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, num_experts=2),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "qwen3_next": LINEAR,
    "rwkv": dict(attention_hidden_size=64, context_length=64),
    "recurrent_gemma": dict(
        block_types=["recurrent", "attention"], lru_width=64, attention_window_size=8
    ),
}
STATES = {"mamba": 4, "jamba": 2, "lfm2": 1, "qwen3_next": 2, "rwkv": 5, "recurrent_gemma": 2}


@pytest.fixture(scope="module")
def compiled():
    """A compiled model and the model, by type; each is made once."""
    made = {}

    def get(name):
        if name not in made:
            model = tiny(name, **MODELS[name])
            made[name] = (regraft.compile(model), model)
        return made[name]

    return get


def eager(model, ids, mask):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    extra = {} if model.config.model_type in ("mamba", "rwkv") else {"position_ids": positions}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits


@pytest.mark.parametrize("name", MODELS)
def test_equals_eager_over_a_padded_batch(name, compiled, batch):
    fast, model = compiled(name)
    assert len(fast.program.cache.states) == STATES[name]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected, real = eager(model, ids, mask), mask.bool()
    limit = 1e-5 * expected.abs().max()
    cache = fast.new_cache()
    prompt = fast(ids[:, :5], mask[:, :5], past_key_values=cache).logits
    assert (prompt - expected[:, :5])[real[:, :5]].abs().max() <= limit
    for length in (6, 7, 8):
        step = fast(ids[:, length - 1 : length], mask[:, :length], past_key_values=cache).logits
        assert (step[:, 0] - expected[:, length - 1]).abs().max() <= limit
    assert cache.get_seq_length() == 8 and cache.state.batch == 2
    cache.crop(-3)
    several = fast(ids[:, 5:], mask, past_key_values=cache, logits_to_keep=2).logits
    assert (several - expected[:, -2:]).abs().max() <= limit


@pytest.mark.parametrize("name", ["jamba", "lfm2", "qwen3_next"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_equals_eager(name, beams, compiled, batch):
    fast, model = compiled(name)
    options = dict(max_new_tokens=6, do_sample=False, num_beams=beams)
    assert torch.equal(model.generate(**batch, **options), fast.generate(**batch, **options))


def test_a_prompt_longer_than_the_chunk_that_was_traced(compiled):
    fast, model = compiled("qwen3_next")
    assert fast.program.prefill.tokens == (2, 63)
    ids = torch.randint(3, 256, (1, 64 * 2), generator=torch.Generator().manual_seed(2))
    expected = eager(model, ids, torch.ones_like(ids))
    assert (fast(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert fast.program.prefill.graph is not fast.program.graph


def test_cropping_beyond_the_kept_steps_changes_nothing(compiled, batch):
    fast, _ = compiled("lfm2")
    cache = fast.new_cache()
    fast(**batch, past_key_values=cache)
    with pytest.raises(ValueError, match="recurrent states"):
        cache.crop(1)
    assert cache.state.length == cache.state.layers[0].length == 9
    assert not cache.is_croppable
    cache.crop(0)
    assert cache.state.length == 0


def test_reordered_rows_continue_as_their_own(compiled, batch):
    fast, _ = compiled("lfm2")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache, swapped = fast.new_cache(), fast.new_cache()
    order = torch.tensor([1, 0])
    fast(ids[:, :8], mask[:, :8], past_key_values=cache)
    fast(ids[order, :8], mask[order, :8], past_key_values=swapped)
    swapped.reorder_cache(order)
    steps = [fast(ids[:, 8:], mask, past_key_values=c).logits for c in (cache, swapped)]
    torch.testing.assert_close(*steps, atol=1e-6, rtol=1e-5)


def test_quantised_cache_takes_the_attention_layers_alone(compiled, batch):
    _, model = compiled("jamba")
    coded = regraft.compile(model, [regraft.KVQuant(bits=8)])
    assert [layer.format for layer in coded.program.cache.layers] == ["kvquant"]
    assert len(coded.program.cache.states) == 2
    exact = compiled("jamba")[0](**batch).logits
    torch.testing.assert_close(coded(**batch).logits, exact, atol=1e-6, rtol=1e-5)
    with pytest.raises(RegraftError, match="KVQuant matched nothing"):
        regraft.compile(compiled("mamba")[1], [regraft.KVQuant(bits=8)])


def test_saved_and_loaded_with_its_prefill(compiled, batch, tmp_path):
    fast, _ = compiled("qwen3_next")
    fast.save(tmp_path / "saved")
    loaded = regraft.load(tmp_path / "saved")
    assert loaded.program.prefill.tokens == (2, 63)
    assert loaded.program.cache == fast.program.cache
    options = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(**batch, **options), fast.generate(**batch, **options))


def test_program_and_prefill_share_their_weights(compiled):
    program = compiled("qwen3_next")[0].program
    parts = [dict(part.graph_module.named_parameters()) for part in program.parts.values()]
    shared = parts[0].keys() & parts[1].keys()
    assert any("fused" in name for name in shared)
    assert all(parts[0][name] is parts[1][name] for name in shared)


def test_modules_get_back_what_they_held(compiled):
    _, model = compiled("recurrent_gemma")
    block = model.model.layers[0].temporal_block
    held = (block.conv1d_state, block.rg_lru.recurrent_states)
    assert all(state is None or type(state) is torch.Tensor for state in held)


def test_states_that_do_not_start_empty_are_refused(monkeypatch):
    zeros = Memory.zeros
    monkeypatch.setattr(Memory, "zeros", lambda self, rows: [t + 1 for t in zeros(self, rows)])
    with pytest.raises(RegraftError, match="differs from the whole prompt"):
        capture(tiny("mamba", state_size=8))


def specs():
    fixed = TensorSpec("past_key_values.0.conv", ("batch_size", 4), torch.float32, "state")
    counter = TensorSpec("past_key_values.count", (1,), torch.long, "state")
    return fixed, counter


def test_states_keep_the_last_steps_only():
    states = RecurrentStates(specs(), rollback=2)
    assert [tuple(s.shape) for s in states.read(3, torch.device("cpu"))] == [(3, 4), (1,)]
    for step in range(1, 6):
        states.append([torch.full((3, 4), float(step)), torch.tensor([step])], 1)
    assert states.length == 5 and states.batch == 3
    assert states.nbytes == 3 * (3 * 4 * 4 + 8)
    with pytest.raises(ValueError, match="3, 4, 5"):
        states.truncate(2)
    states.truncate(3)
    assert states.length == 3 and states.read(3, torch.device("cpu"))[1].item() == 3
    states.append([torch.arange(12.0).view(3, 4), torch.tensor([4])], 1)
    states.reorder(torch.tensor([2, 0]))
    conv, count = states.read(2, torch.device("cpu"))
    assert conv[:, 0].tolist() == [8.0, 0.0] and count.item() == 4
    states.truncate(0)
    assert states.length == 0 and not states.read(1, torch.device("cpu"))[0].any()


def test_states_that_grow_are_cut_at_any_length():
    spec = TensorSpec("k", ("batch_size", "past_sequence_length", 2), torch.float32, "state")
    states = RecurrentStates([spec], rollback=1)
    assert states.read(2, torch.device("cpu"))[0].shape == (2, 0, 2)
    states.append([torch.arange(20.0).view(2, 5, 2)], 5)
    states.truncate(3)
    assert states.length == 3
    assert states.read(2, torch.device("cpu"))[0][0, :, 0].tolist() == [0.0, 2.0, 4.0]


def test_a_small_view_does_not_keep_a_large_tensor():
    states = RecurrentStates(specs()[:1])
    states.append([torch.zeros(1, 4000)[:, -4:]], 1)
    assert states.read(1, torch.device("cpu"))[0].untyped_storage().nbytes() == 16
