import pytest
import torch
import torch.nn.functional as F

from regraft.kernels.linear.reference import in_blocks, linear, linear_in_blocks


@pytest.mark.parametrize("shape", [(32,), (1, 32), (1, 1, 32), (2, 3, 32)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("function", [linear, linear_in_blocks])
def test_equals_torch(shape, with_bias, function):
    weight, bias = torch.randn(64, 32), torch.randn(64) if with_bias else None
    x = torch.randn(shape)
    torch.testing.assert_close(function(x, weight, bias), F.linear(x, weight, bias))


def test_weights_that_do_not_split_are_left_to_torch():
    x = torch.randn(1, 32)
    assert not in_blocks(x, torch.randn(63, 32))
    assert not in_blocks(x, torch.randn(32, 64).t())
    for weight in (torch.randn(63, 32), torch.randn(32, 64).t()):
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_left_to_torch(dtype):
    x, weight = torch.randn(1, 32, dtype=dtype), torch.randn(64, 32, dtype=dtype)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
