import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import regraft


class Sdpa(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, mask, **self.options)


def states(queries, keys, heads=4, key_heads=4):
    torch.manual_seed(queries)
    q, k, v = (torch.randn(2, h, n, 8) for h, n in ((heads, queries), *((key_heads, keys),) * 2))
    return q, k, v


LENGTHS = [(5, 5), (3, 7), (7, 3), (1, 4)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.5}, {"is_causal": True}, {"is_causal": True, "enable_gqa": True}],
    ids=str,
)
def test_attention_equals_torch_at_other_lengths(options, lengths):
    grouped = {"key_heads": 2} if "enable_gqa" in options else {}
    rows, columns = (
        (Dim("rows"), Dim("columns")) if lengths[0] != lengths[1] else (Dim("rows"),) * 2
    )
    shapes = ({2: rows}, {2: columns}, {2: columns})
    example = states(6, 6 if rows is columns else 9, **grouped)
    compiled = regraft.compile(Sdpa(**options), example_inputs=example, dynamic_shapes=shapes)
    assert [row.matches for row in compiled.report.rows if row.name == "RaiseSdpa"] == [1]
    inputs = states(*lengths, **grouped)
    expected = F.scaled_dot_product_attention(*inputs, **options)
    torch.testing.assert_close(compiled(*inputs), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_are_kept(kind):
    q, k, v = states(5, 7)
    mask = torch.rand(2, 1, 5, 7) > 0.3
    mask = mask if kind == "bool" else torch.where(mask, 0.0, -2.0)
    compiled = regraft.compile(Sdpa(), example_inputs=(q, k, v, mask))
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(compiled(q, k, v, mask), expected, rtol=0, atol=1e-6)


def test_what_is_no_grouped_attention_is_left_with_its_reason():
    q, k, v = states(5, 5)
    compiled = regraft.compile(Sdpa(), example_inputs=(q[0], k[0], v[0]))
    assert "3 dimensions" in str(compiled.report)
    expected = F.scaled_dot_product_attention(q[0], k[0], v[0])
    assert torch.equal(compiled(q[0], k[0], v[0]), expected)
