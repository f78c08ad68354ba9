import json
import shutil

import pytest
import torch

import regraft
from tests.conftest import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = tiny("llama", num_hidden_layers=4, tie_word_embeddings=True)
    folder = tmp_path_factory.mktemp("artefact") / "llama"
    fast = regraft.compile(model, [regraft.KVQuant(bits=8)])
    fast.save(folder)
    return fast, folder


@pytest.fixture
def damaged(saved, tmp_path):
    return shutil.copytree(saved[1], tmp_path / "damaged")


def test_load_gives_the_same_model(saved, batch):
    fast, folder = saved
    again = regraft.load(folder)
    assert torch.equal(fast(**batch).logits, again(**batch).logits)
    made = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(fast.generate(**batch, **made), again.generate(**batch, **made))
    assert [row.name for row in again.report.rows] == [row.name for row in fast.report.rows]
    assert again.program.cache == fast.program.cache
    assert not any(path.suffix in (".pkl", ".bin", ".pt") for path in folder.rglob("*"))


def test_what_was_loaded_can_be_saved_over_itself(damaged, batch):
    first = regraft.load(damaged)
    first.save(damaged)
    assert torch.equal(first(**batch).logits, regraft.load(damaged)(**batch).logits)
    assert [path.name for path in damaged.parent.iterdir()] == [damaged.name]


def test_a_changed_byte_is_found_in_every_file(damaged):
    for name in [p.name for p in damaged.iterdir() if p.is_file()]:
        path = damaged / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(regraft.RegraftError, match=name):
            regraft.load(damaged)
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    regraft.load(damaged)


def test_truncated_or_missing_files_are_named(damaged):
    weights = damaged / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(regraft.RegraftError, match="weights.safetensors differs"):
        regraft.load(damaged)
    weights.unlink()
    with pytest.raises(regraft.RegraftError, match="weights.safetensors is missing"):
        regraft.load(damaged)


def test_another_version_says_so(damaged):
    import hashlib

    head = damaged / "regraft.json"
    content = json.loads(json.loads(head.read_text())["content"])
    text = json.dumps({**content, "version": 99})
    digest = hashlib.sha256(text.encode()).hexdigest()
    head.write_text(json.dumps({"sha256": digest, "content": text}))
    with pytest.raises(regraft.RegraftError, match="version 99"):
        regraft.load(damaged)


def test_a_folder_that_is_none(tmp_path, saved):
    with pytest.raises(regraft.RegraftError, match="no regraft artefact"):
        regraft.load(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(regraft.RegraftError, match="name another folder"):
        saved[0].save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_no_room_leaves_nothing(saved, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(regraft.RegraftError, match="cannot be written"):
        saved[0].save(tmp_path / "file" / "artefact")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_calibrated_cache_comes_back_whole_and_can_be_used_again(tmp_path, batch):
    model = tiny("llama")
    ids = torch.randint(3, 256, (2, 256), generator=torch.Generator().manual_seed(3))
    fast = regraft.compile(model, [regraft.KVQuant(bits=3)], calibration=[ids])
    fast.save(tmp_path / "model")
    again = regraft.load(tmp_path / "model")
    file = tmp_path / "model" / "calibration.safetensors"
    other = regraft.compile(model, [regraft.KVQuant(bits=3, calibration=str(file))])
    for found in (again, other):
        for mine, theirs in zip(fast.program.cache.layers, found.program.cache.layers, strict=True):
            assert mine.settings == theirs.settings and mine.tensors.keys() == theirs.tensors.keys()
            assert all(
                torch.equal(mine.tensors[name], theirs.tensors[name]) for name in mine.tensors
            )
