import pytest
import torch

import regraft
from regraft.runtime.cuda_graph import at_position
from tests.conftest import tiny

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "mistral"])
def test_a_step_at_a_position_equals_a_step(model_type, batch):
    fast = regraft.compile(tiny(model_type, num_hidden_layers=3), target="reference")
    step = at_position(fast._run.step)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    grown, held = fast.new_cache(), fast.new_cache()
    for cache in (grown, held):
        fast(ids[:, :6], mask[:, :6], past_key_values=cache)
    state = held.state
    for layer in state.layers:
        layer.reserve(20)
    capacity = state.layers[0].full.shape[2]
    for at in (6, 7, 8):
        want = fast(ids[:, at : at + 1], mask[:, : at + 1], past_key_values=grown).logits
        padding = torch.zeros(2, capacity, dtype=torch.long)
        padding[:, : at + 1] = mask[:, : at + 1]
        positions = mask[:, : at + 1].sum(-1, keepdim=True) - 1
        state.position = torch.tensor([state.length])
        with torch.no_grad():
            got, tables = step(ids[:, at : at + 1], padding, positions, torch.tensor([0]), state)
        for layer in state.layers:
            layer.advance()
        for table, rows in zip(state.tables, tables, strict=True):
            table.append(*rows)
        assert (want - got).abs().max() < 1e-5 * want.abs().max()


@cuda
def test_generation_on_cuda_equals_eager(batch):
    model = tiny("llama", num_hidden_layers=3).cuda()
    fast = regraft.compile(model, target="cuda")
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    for settings in ({}, {"num_beams": 3}):
        made = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **settings}
        assert torch.equal(model.generate(**batch, **made), fast.generate(**batch, **made))


@cuda
def test_a_recording_follows_its_cache(batch):
    model = tiny("llama", num_hidden_layers=3).cuda()
    fast = regraft.compile(model, target="cuda")
    ids = batch["input_ids"].cuda()
    cache = fast.new_cache()
    fast(ids[:, :5], past_key_values=cache)
    for _ in range(2):
        for at in (5, 6, 7):
            got = fast(ids[:, at : at + 1], past_key_values=cache).logits
            want = model(ids[:, : at + 1]).logits[:, -1:]
            assert (want - got).abs().max() < 1e-4 * want.abs().max()
        cache.crop(5)
    assert cache.state.recording is not None
    cache.batch_select_indices(torch.tensor([1, 1], device="cuda"))
    got = fast(ids[1:, 5:6].repeat(2, 1), past_key_values=cache).logits
    want = model(ids[1:, :6]).logits[:, -1:]
    assert (want - got).abs().max() < 1e-4 * want.abs().max()
