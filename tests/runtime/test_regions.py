import os
import shutil
import subprocess
import sys

import pytest
import torch

import regraft
from regraft.runtime.regions import region_jobs
from tests.conftest import tiny


@pytest.fixture
def inductor(monkeypatch, tmp_path):
    monkeypatch.setenv("REGRAFT_INDUCTOR", "1")
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_regions_compile_decode_and_travel_with_the_artefact(inductor, batch, monkeypatch):
    model = tiny("llama", num_hidden_layers=4)
    fast = regraft.compile(model)
    assert fast.regions["region_0"].compiled
    with torch.no_grad():
        for inputs in ({k: v[1:] for k, v in batch.items()}, batch):
            mine, theirs = fast(**inputs), model(**inputs, use_cache=True)
            for token in (5, 6):
                ids = torch.full((len(inputs["input_ids"]), 1), token)
                inputs["attention_mask"] = torch.cat([inputs["attention_mask"], ids > 0], 1)
                step = {"input_ids": ids, "attention_mask": inputs["attention_mask"]}
                mine = fast(**step, past_key_values=mine.past_key_values)
                theirs = model(**step, past_key_values=theirs.past_key_values)
                scale = theirs.logits.abs().max()
                if len(ids) == 1:
                    assert (mine.logits - theirs.logits).abs().max() < 1e-5 * scale
    fast.save(inductor / "saved")
    shutil.rmtree(inductor / "regions")
    monkeypatch.setenv("PATH", "/nowhere")
    again = regraft.load(inductor / "saved")
    assert again.regions["region_0"].compiled
    one = torch.tensor([[7]])
    assert torch.equal(fast(one).logits, again(one).logits)


def test_without_a_compiler_one_notice(inductor, monkeypatch, notices, batch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", "/nowhere/g++")
    fast = regraft.compile(tiny("llama", num_hidden_layers=4))
    assert not fast.regions["region_0"].compiled
    assert len(notices) == 1 and "C++ compiler" in notices[0]
    assert fast(**batch).logits.isfinite().all()


def test_jobs_are_stable_across_processes(batch):
    code = (
        "import regraft, json; from tests.conftest import tiny\n"
        "from regraft.runtime.regions import region_jobs\n"
        "print(json.dumps(region_jobs(regraft.compile(tiny('llama', num_hidden_layers=4)).program),"
        " sort_keys=True))"
    )
    done = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, ["", *sys.path]))},
        ).stdout.splitlines()[-1]
        for _ in range(2)
    ]  # fmt: skip
    assert done[0] == done[1] and len(done[0]) > 100


def test_a_job_names_sizes_and_strides():
    program = regraft.compile(tiny("llama", num_hidden_layers=4)).program
    job = region_jobs(program)["region_0"]
    assert job["inputs"][0]["shape"] == [1, 4, 1, 16]
    assert all(isinstance(n, int) for item in job["inputs"] for n in item["shape"])
