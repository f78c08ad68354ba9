"""PyTorch's own samples of its operators, put off and run later: equal to eager, kinds included."""

import warnings

import pytest
import torch
from torch.utils._pytree import tree_flatten

import regraft

SAMPLES = 2
# results hold uninitialised memory
UNSPECIFIED = ("empty", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted",
               "empty_like")  # fmt: skip


def outcome(call):
    torch.manual_seed(0)
    try:
        result = call()
        kinds, kept = [], []
        for item in tree_flatten(result)[0]:
            if isinstance(item, torch.Tensor):
                kinds.append((item.shape, item.stride(), item.dtype, item.requires_grad))
                kept.append(item.detach())
            else:
                kinds.append(item)
        return kinds, kept
    except Exception as error:
        return type(error).__name__, []


def same(left, right):
    (kinds, tensors), (own_kinds, own) = left, right
    if repr(kinds) != repr(own_kinds):
        return False
    return all(
        torch.equal(a.to_dense().nan_to_num(7), b.to_dense().nan_to_num(7))
        if a.is_floating_point()
        else torch.equal(torch.view_as_real(a).nan_to_num(7), torch.view_as_real(b).nan_to_num(7))
        if a.is_complex() and not a.is_conj()
        else torch.equal(a, b)
        for a, b in zip(tensors, own, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_samples_of_every_operator(grad):
    pytest.importorskip("torch.testing._internal.common_methods_invocations")
    from torch.testing._internal.common_methods_invocations import op_db

    wrong, symbolic = [], 0
    for op in op_db:
        if op.name in UNSPECIFIED or torch.float32 not in op.supported_dtypes("cpu"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples = op.sample_inputs("cpu", torch.float32, requires_grad=grad)
            for _, sample in zip(range(SAMPLES), samples, strict=False):

                def call(op=op, sample=sample):
                    return op(sample.input, *sample.args, **sample.kwargs)

                expected = outcome(call)
                together = regraft.coexecute(call, backend="replay", measure=False)
                found = [outcome(together) for _ in range(3)]
                symbolic += together.report().deferred > 0
                if not all(same(expected, one) for one in found):
                    wrong.append((op.name, expected[0], [one[0] for one in found]))
    assert not wrong, wrong
    assert symbolic > 500
