import math

import pytest
import torch

import regraft
from regraft.assets import python_docs
from regraft.benchmarks import perplexity
from regraft.program import RegraftError


@pytest.fixture(scope="module")
def measured(llama):
    ids = torch.randint(3, 256, (1, 201), generator=torch.Generator().manual_seed(0))
    passes = {"dense": [], "2": [regraft.KVQuant(bits=2)], "8": [regraft.KVQuant(bits=8)]}
    contenders = {name: regraft.compile(llama, asked) for name, asked in passes.items()}
    totals, kept = perplexity.measure(contenders, [ids], 16)
    return ids, totals, kept


def test_dense_loss_is_the_models_own(llama, measured):
    ids, totals, _ = measured
    with torch.no_grad():
        loss = llama(ids, labels=ids).loss.item()
    dense = totals["dense"]
    assert dense.tokens == dense.agreeing == 200 and dense.divergence == 0
    assert dense.loss / dense.tokens == pytest.approx(loss, rel=1e-5)


def test_fewer_bits_diverge_more_and_keep_less(measured):
    _, totals, kept = measured
    assert 0 < totals["8"].divergence < totals["2"].divergence / 10
    assert kept["2"] < kept["8"] < kept["dense"]


def test_rows_compare_with_dense(measured):
    _, totals, kept = measured
    passes = {"dense": None, "2": regraft.KVQuant(bits=2), "8": regraft.KVQuant(bits=8)}
    dense, two, _ = perplexity._rows(passes, totals, kept, 256, 1)
    assert dense["ratio"] == 1 and dense["bits"] == 32
    assert two["perplexity"] == pytest.approx(math.exp(totals["2"].loss / 200))
    assert two["share of float16"] == kept["2"] / 256


def test_windows_come_from_long_documents(tmp_path):
    (tmp_path / "short.rst.txt").write_text("a" * 1000)
    for name in "abc":
        (tmp_path / f"{name}.rst.txt").write_text(name * 70_000)

    def tokenizer(text, return_tensors):
        return {"input_ids": torch.tensor([[ord(letter) for letter in text]])}

    windows, names = perplexity.text_windows(tokenizer, tmp_path, 100, 2)
    again, _ = perplexity.text_windows(tokenizer, tmp_path, 100, 2)
    assert [ids.shape for ids in windows] == [(1, 100), (1, 100)]
    assert all(torch.equal(x, y) for x, y in zip(windows, again, strict=True))
    assert len({name.split("@")[0] for name in names}) == 2


def test_missing_texts_give_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("regraft.assets.INSTALLED_DOCS", tmp_path / "none")
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RegraftError, match="need apt-get and dpkg-deb"):
        python_docs()
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho no such package >&2\nexit 100\n")
    (tmp_path / "dpkg-deb").write_text("#!/bin/sh\nexit 0\n")
    for name in ("apt-get", "dpkg-deb"):
        (tmp_path / name).chmod(0o755)
    with pytest.raises(RegraftError, match="no such package"):
        python_docs()
    assert not (tmp_path / "python3.11-doc").exists()
