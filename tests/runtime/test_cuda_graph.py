import copy

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


@cuda
def test_steps_with_and_without_a_mask_take_turns(batch):
    model = tiny("llama", num_hidden_layers=3)
    plain = regraft.compile(model, target="reference")
    fast = regraft.compile(copy.deepcopy(model).cuda(), target="cuda")
    ids, seen = batch["input_ids"], 5
    caches = plain.new_cache(), fast.new_cache()
    turns = ["all", None, None, "padded", None, "all", "cropped", None, "padded", None, None]
    for turn in ["prompt", *turns]:
        if turn == "cropped":
            seen -= 3
            for cache in caches:
                cache.crop(seen)
        given = ids[:, :seen] if turn == "prompt" else ids[:, seen % 9 : seen % 9 + 1]
        seen += turn != "prompt"
        mask = torch.ones(2, seen, dtype=torch.long) if turn in ("all", "padded") else None
        if turn == "padded":
            mask[0, :2] = 0
        want = plain(given, mask, past_key_values=caches[0]).logits
        got = fast(
            given.cuda(), None if mask is None else mask.cuda(), past_key_values=caches[1]
        ).logits
        assert (want - got.cpu()).abs().max() < 1e-4 * want.abs().max(), turn
    assert caches[1].state.recording is not None


@cuda
def test_generation_beyond_the_room_of_a_recording(batch):
    model = tiny("llama", num_hidden_layers=3, max_position_embeddings=2048).cuda()
    fast = regraft.compile(model, target="cuda")
    ids = batch["input_ids"].cuda()[:1, :5]
    made = {"max_new_tokens": 1100, "min_new_tokens": 1100, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **made), fast.generate(ids, **made))
    cache = fast.new_cache()
    logits = fast(ids, past_key_values=cache).logits
    tokens = [ids]
    with torch.no_grad():
        for _ in range(1100):
            tokens.append(logits[:, -1:].argmax(-1))
            logits = fast(tokens[-1], past_key_values=cache).logits
    assert torch.equal(torch.cat(tokens, 1), model.generate(ids, **made))
