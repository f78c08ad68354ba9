import pytest
import torch

from regraft.frontends.huggingface import capture
from regraft.passes import DEFAULT, Context, run
from regraft.passes.recorder import Runner, record
from tests.conftest import tiny


@pytest.fixture(scope="module")
def program(llama):
    program = capture(llama)
    run(program, DEFAULT, Context())
    return program


@pytest.fixture(scope="module")
def nodes(program):
    target = torch.ops.regraft.cached_attention.default
    return program.graph.find_nodes(op="call_function", target=target)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 256, (1, 12), generator=torch.Generator().manual_seed(2))


def test_runner_gives_the_models_logits(llama, program, ids):
    with torch.no_grad():
        expected = llama(ids).logits
        torch.testing.assert_close(Runner(program, {}).logits(ids), expected)
        kept = Runner(program, {}).logits(ids, torch.tensor([3, 11]))
    torch.testing.assert_close(kept, expected[:, [3, 11]])


def test_keys_are_the_models_own_before_rotation(llama, program, nodes, ids):
    seen = {}
    layers = [layer.self_attn.k_proj for layer in llama.model.layers]
    hooks = [
        layer.register_forward_hook(lambda m, i, out, n=n: seen.update({n: out}))
        for n, layer in zip(nodes, layers, strict=True)
    ]
    with torch.no_grad():
        llama(ids)
    for hook in hooks:
        hook.remove()
    found = record(program, dict.fromkeys(nodes, (1,)), ids, gradients=False)
    for node in nodes:
        ((key, gradient),) = found[node]
        assert gradient is None
        torch.testing.assert_close(key[0].transpose(0, 1).flatten(1), seen[node][0])


def test_gradients_predict_the_loss(ids):
    program = capture(tiny("llama").double())
    run(program, DEFAULT, Context())
    target = torch.ops.regraft.cached_attention.default
    nodes = program.graph.find_nodes(op="call_function", target=target)

    def loss(edits):
        with torch.no_grad():
            log_p = Runner(program, edits).logits(ids)[0, :-1].log_softmax(-1)
        return -log_p.gather(1, ids[0, 1:, None]).sum().item()

    # the loss is taken in float32
    found = record(program, dict.fromkeys(nodes, (1, 2)), ids, gradients=True)
    generator = torch.Generator().manual_seed(3)
    for node in nodes:
        for place, (x, gradient) in zip((1, 2), found[node], strict=True):
            step = 1e-3 * torch.randn(x.shape, generator=generator, dtype=x.dtype)

            def moved(sign, place=place, step=step):
                return lambda *args: (*args[:place], args[place] + sign * step, *args[place + 1 :])

            change = (loss({node: moved(1)}) - loss({node: moved(-1)})) / 2
            assert change == pytest.approx((gradient * step).sum().item(), rel=5e-3, abs=1e-6)


def test_weights_keep_no_gradients(llama, program, nodes, ids):
    record(program, dict.fromkeys(nodes, (1, 2)), ids, gradients=True)
    assert all(weight.grad is None for weight in llama.parameters())
