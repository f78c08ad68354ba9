import logging
import os

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from regraft.assets import FOLDER, GGUF_FOLDER, ONNX_FOLDER
from regraft.program.folders import cache_dir

os.environ["REGRAFT_INDUCTOR"] = os.environ["REGRAFT_TVM"] = "0"

SMALL = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=256,
    max_position_embeddings=512,
    pad_token_id=0,
)


def tiny(model_type: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing of a test stays in the user's cache; models that are there are used."""
    real, folder = cache_dir(), tmp_path_factory.mktemp("cache")
    for name in (FOLDER, GGUF_FOLDER, ONNX_FOLDER):
        if (real / name).is_dir():
            (folder / name).symlink_to(real / name)
    before = os.environ.get("REGRAFT_CACHE")
    os.environ["REGRAFT_CACHE"] = str(folder)
    yield folder
    os.environ.pop("REGRAFT_CACHE")
    if before is not None:
        os.environ["REGRAFT_CACHE"] = before


@pytest.fixture
def notices():
    """What regraft tells its user while the test runs."""
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logging.getLogger("regraft").addHandler(handler)
    yield seen
    logging.getLogger("regraft").removeHandler(handler)


@pytest.fixture(scope="session")
def llama():
    return tiny("llama")


@pytest.fixture
def batch():
    """Two prompts, the first padded on the left by three tokens."""
    ids = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}
