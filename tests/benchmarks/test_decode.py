import pytest
import torch

from regraft.benchmarks import contenders, decode
from regraft.benchmarks.contenders import DENSE, EAGER, ONNX, QUANTIZED, build, probe, probe_fresh
from regraft.benchmarks.harness import Check, Result, interleaved
from regraft.program import RegraftError
from tests.conftest import tiny


@pytest.fixture(scope="module")
def built(llama):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGRAFT_INDUCTOR", "0")
        yield {name: build(name, llama) for name in (EAGER, DENSE, QUANTIZED)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(decode, "PROMPT", 40)
    monkeypatch.setattr(decode, "BLOCK", 4)
    monkeypatch.setattr(decode, "ROOM", 64)


def test_copied_caches_continue_like_computed_ones(built):
    ids, caches = decode._fill(built, 50, 60)
    with torch.inference_mode():
        next_ids = {n: contenders.generate(built[n], ids, caches[n], 5) for n in (EAGER, DENSE)}
        alone = contenders.generate(built[EAGER], decode._ids(51), built[EAGER].new_cache(64), 5)
    assert torch.equal(next_ids[EAGER], alone) and torch.equal(next_ids[DENSE], alone)


def test_static_cache_continues_like_a_dynamic_one(llama, built):
    _, filled = decode._fill(built, 50, 60)
    layers = [(layer.key, layer.value) for layer in filled[DENSE].state.layers]
    static = contenders._static_cache(llama, 64)
    contenders._update(static, layers)
    ids = decode._ids(51)[:, -1:]
    with torch.no_grad():
        expected = built[EAGER].call(ids, filled[EAGER])
        torch.testing.assert_close(built[EAGER].call(ids, static), expected)


def test_rows_have_a_speed_a_spread_and_bytes(built):
    with torch.inference_mode():
        times = decode._prefill(built, 3) | decode._decode(built, 20, 8)
    rows = [decode._row(key, found, {"peak MiB": 1.0}) for key, found in times.items()]
    assert {(row["test"], row["depth"]) for row in rows} == {("pp40", 0), ("tg8", 20)}
    assert all(row["t/s"] > 0 and row["± sd"] >= 0 and row["peak MiB"] == 1 for row in rows)
    exact = 30 * 2 * 2 * 2 * 16 * 4
    eager = next(row for row in rows if row["model"] == EAGER and row["test"] == "tg8")
    assert eager["kv bytes/token"] == exact / 30


def test_checks_compare_speeds(llama):
    def row(model, test, depth, speed):
        found = {"speeds": [speed, speed], "kv bytes/token": 10.0}
        return decode._row((model, test, depth), found, {"compile cold s": 31.0})

    rows = [row(EAGER, "tg128", 1024, 10.0), row(DENSE, "tg128", 1024, 16.0)]
    checks = {check.name: check for check in decode._checks(llama.config, rows)}
    assert checks["decode at 1K, dense / eager"] == Check(
        "decode at 1K, dense / eager", 1.6, ">= 1.5", True
    )
    assert checks["decode at 8K, dense / eager"].holds is None
    assert checks["compile seconds, cold"].holds is False


def test_interleaved_takes_turns():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = interleaved(functions, 2)
    assert order == list("ababab")
    assert all(len(times) == 2 and min(times) >= 0 for times in samples.values())


def test_result_formats(tmp_path):
    rows = [{"model": "a", "t/s": 1.0036}, {"model": "b", "t/s": None}]
    result = Result("regraft bench x", {"threads": 1}, rows, [Check.at_least("c", 2.0, 1.5)])
    assert list(result.to_dict()) == ["command", "environment", "rows", "checks"]
    assert result.to_dict()["checks"] == [
        {"name": "c", "value": 2.0, "target": ">= 1.5", "holds": True}
    ]
    assert result.to_csv().splitlines() == ["model,t/s", "a,1.0036", "b,"]
    assert "| a | 1.004 |" in result.to_markdown() and "| b | - |" in result.to_markdown()
    result.write(tmp_path / "deep" / "x.json")
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["x.json", "x.md"]


def test_probe_measures_this_process(tmp_path):
    tiny("llama", max_position_embeddings=1024).save_pretrained(tmp_path)
    cost = probe(EAGER, tmp_path, None)
    assert cost["first"] > 0 and cost["later"] > 0
    assert 50 < cost["peak MiB"] < 100_000


@pytest.mark.slow
def test_a_fresh_process_says_why_it_failed(tmp_path):
    tiny("llama", max_position_embeddings=1024).save_pretrained(tmp_path)
    with pytest.raises(RegraftError, match="holds no model.onnx"):
        probe_fresh(ONNX, tmp_path, tmp_path, tmp_path / "caches")
    assert probe_fresh(EAGER, tmp_path, None, tmp_path / "caches")["peak MiB"] > 50
