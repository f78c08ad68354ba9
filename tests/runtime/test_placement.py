from types import SimpleNamespace

import pytest
import torch

from regraft.program import RegraftError
from regraft.runtime.placement import check_placement

HERE = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float16)


@pytest.mark.parametrize("target", ["cuda", "cuda:0", torch.float16, torch.device("cuda", 0)])
def test_staying_is_fine(target):
    check_placement(HERE, target)


@pytest.mark.parametrize("target", ["cpu", "cuda:1", torch.float32])
def test_moving_is_refused(target):
    with pytest.raises(RegraftError, match="compiled for cuda:0 and torch.float16"):
        check_placement(HERE, target)
