import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import regraft
from regraft.frontends import huggingface
from regraft.passes import DEFAULT
from regraft.runtime.program_cache import fingerprint
from tests.conftest import tiny


@pytest.fixture
def captures(monkeypatch, tmp_path):
    """The models captured while the test runs, with an empty cache."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path))
    seen = []
    capture = huggingface.capture
    monkeypatch.setattr(huggingface, "capture", lambda model: seen.append(model) or capture(model))
    return seen


def test_the_second_compile_captures_nothing(captures, batch):
    model = tiny("llama")
    first = regraft.compile(model, [regraft.KVQuant()])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    second = regraft.compile(model, [regraft.KVQuant()])
    assert len(captures) == 1
    assert str(first.report) == str(second.report)
    with torch.no_grad():
        want = model(**batch).logits
    got = second(**batch).logits
    seen = batch["attention_mask"].bool()
    assert (want - got)[seen].abs().max() < 1e-5 * want.abs().max()


def test_other_settings_are_another_program(captures):
    model = tiny("llama")
    regraft.compile(model, [regraft.KVQuant(bits=4)])
    eight = regraft.compile(model, [regraft.KVQuant(bits=8)])
    assert len(captures) == 2
    assert dict(eight.program.cache.layers[0].settings)["key_bits"] == 8


def test_what_changes_a_program_changes_its_key():
    model = tiny("llama")
    keys = [fingerprint(model, DEFAULT)]
    assert keys[0] == fingerprint(copy.deepcopy(model), DEFAULT)
    model.model.layers[1].self_attn.scaling = 0.5
    keys.append(fingerprint(model, DEFAULT))
    model.config.rms_norm_eps = 0.1
    keys.append(fingerprint(model, DEFAULT))
    model.model.rotary_emb.inv_freq.mul_(2)
    keys.append(fingerprint(model, DEFAULT))
    model.lm_head.weight = model.model.embed_tokens.weight
    keys.append(fingerprint(model, DEFAULT))
    assert None not in keys and len(set(keys)) == len(keys)


def test_hooks_and_patches_are_never_kept():
    model = tiny("llama")
    hook = model.model.norm.register_forward_hook(lambda *_: None)
    assert fingerprint(model, DEFAULT) is None
    hook.remove()
    model.model.norm.forward = lambda x: x
    assert fingerprint(model, DEFAULT) is None


def test_a_damaged_entry_is_made_anew(captures, tmp_path, notices):
    model = tiny("llama")
    regraft.compile(model)
    (entry,) = (tmp_path / "programs").iterdir()
    entry.write_bytes(entry.read_bytes()[:100])
    regraft.compile(model)
    assert len(captures) == 2 and "damaged" in notices[0]
    regraft.compile(model)
    assert len(captures) == 2


def test_no_room_is_a_notice(captures, tmp_path, monkeypatch, notices):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "file"))
    regraft.compile(tiny("llama"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert len(notices) == 1 and "not kept" in notices[0]


def test_two_at_once(captures, tmp_path, batch):
    models = [tiny("llama"), tiny("llama")]
    with ThreadPoolExecutor(2) as pool:
        first, second = (model.logits for model in pool.map(
            lambda model: regraft.compile(model)(**batch), models
        ))  # fmt: skip
    assert torch.equal(first, second)
    assert len(list((tmp_path / "programs").iterdir())) == 1
