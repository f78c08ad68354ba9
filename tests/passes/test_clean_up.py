import torch

from regraft.passes import CleanUp, Context, run
from tests.passes.tracing import count, inputs, program_of

aten = torch.ops.aten


def cleaned(function, *shapes):
    program = program_of(function, *shapes)
    run(program, [CleanUp()], Context())
    given = inputs(*shapes, batch=5, queries=4, past=2)
    for got, expected in zip(program(*given), function(*given), strict=True):
        torch.testing.assert_close(got, expected)
    return program


def test_a_buffer_filled_slice_by_slice_becomes_a_concatenation():
    def filled(x, y):
        out = x.new_empty(x.shape[0], x.shape[1], 12)
        out[..., 4:] = y
        out[..., :4] = x * 2
        return (out + 1,)

    program = cleaned(filled, ("b", "s", 4), ("b", "s", 8))
    assert count(program, aten.copy_.default) == 0
    assert count(program, aten.cat.default) == 1


def test_a_buffer_that_is_not_filled_or_read_early_stays():
    def partly(x):
        out = x.new_zeros(x.shape[0], x.shape[1], 12)
        out[..., :4] = x
        return (out,)

    def early(x, y):
        out = x.new_empty(x.shape[0], x.shape[1], 8)
        out[..., :4] = x
        first = out[..., :4] * 2
        out[..., 4:] = y
        return (out + first[..., :1],)

    assert count(cleaned(partly, ("b", "s", 4)), aten.copy_.default) == 1
    assert count(cleaned(early, ("b", "s", 4), ("b", "s", 4)), aten.copy_.default) == 2


def test_sizes_are_read_from_inputs_only():
    def sized(x):
        y = torch.cat([x, x], 1)[:, 1:]
        return (y.reshape(y.shape[0] * y.shape[1], -1) * y.shape[1],)

    program = cleaned(sized, ("b", "s", 4))
    for node in program.graph.find_nodes(op="call_function", target=aten.sym_size.int):
        assert node.args[0].op == "placeholder"


def test_whole_slices_go():
    program = cleaned(lambda x: (x[:, :] + x[..., 1:],), ("b", "s", 2))
    assert count(program, aten.slice.Tensor) == 1
