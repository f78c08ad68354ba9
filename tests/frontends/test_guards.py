import pytest
import torch

import regraft
from regraft.frontends.guards import longest_context
from regraft.frontends.tracing import trace
from regraft.program import TensorSpec
from tests.conftest import tiny


class Chosen(torch.nn.Module):
    """Attends to at most ``most`` tokens, as Python decides."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.model = most, torch.nn.Identity()

    def forward(self, ids, past):
        total = ids.shape[1] + past.shape[2]
        kept = past[:, :, -self.most :] if total > self.most else past
        return ids.sum() + kept.sum()


@pytest.mark.parametrize("most", [12, 100, 1000])
def test_a_limit_in_python_is_found(most):
    inputs = [
        TensorSpec("input_ids", ("batch_size", "sequence_length"), torch.long, "ids"),
        TensorSpec("past", ("batch_size", 1, "past_sequence_length", 4), torch.float32, "cache"),
    ]
    examples = [torch.ones(2, 3, dtype=torch.long), torch.ones(2, 1, 7, 4)]
    _, _, fakes = trace(Chosen(most), inputs, examples, [(0, 1), (0, 2)])
    assert longest_context(inputs, fakes) == most


def test_a_plain_model_serves_any_length_and_a_limited_one_says_so(batch):
    fast = regraft.compile(tiny("llama"), target="reference")
    assert fast.program.context is None
    fast.program.context = 8
    fast(batch["input_ids"][:, :8])
    with pytest.raises(regraft.RegraftError, match="9 tokens are beyond the 8"):
        fast(batch["input_ids"])
