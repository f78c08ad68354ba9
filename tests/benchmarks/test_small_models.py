import os
import signal
import subprocess
import sys
import time

import pytest

from regraft.benchmarks.small_models import small_model


@pytest.mark.parametrize("name", ["qwen3_next", "bamba", "jamba", "gemma3", "zamba2"])
def test_a_small_model_keeps_a_layer_of_each_kind(name):
    from transformers import AutoConfig

    model = small_model(name)
    config = model.config.get_text_config(decoder=True)
    default = AutoConfig.for_model(name).get_text_config(decoder=True)
    kinds = set(default.layer_types) if name != "bamba" else {"linear_attention", "full_attention"}
    assert set(config.layer_types) == kinds
    assert config.num_hidden_layers <= 4 and model.num_parameters() < 5_000_000


def test_a_type_that_cannot_be_built_says_why():
    with pytest.raises(RuntimeError, match="no small configuration runs: .*dropout"):
        small_model("musicgen")


PARENT = """
import os, signal
from multiprocessing import get_context
from regraft.benchmarks.capture import _serve
if __name__ == "__main__":
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_serve, args=(theirs,))
    process.start()
    ours.recv()
    ours.send("hrm_text")
    print(process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_worker_ends_with_its_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    done = subprocess.run(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()}, timeout=120,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    worker = int(done.stdout)
    for _ in range(50):
        if not _alive(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail(f"worker {worker} outlives its parent")


def _alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
