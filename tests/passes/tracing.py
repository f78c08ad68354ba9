"""Programs from small functions of queries, keys and values."""

import torch
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from regraft.program import CacheSpec, LayerState, Program, TensorSpec

BATCH, QUERIES, PAST = 2, 3, 7


def program_of(function, *shapes):
    """The program of function(*tensors): "b", "s" and "p" in shapes are dynamic sizes.

    Inputs of length "p" are cached; the first output is what the function computes, the others
    are the cached tensors after it.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    examples, fakes, specs = inputs(*shapes), [], []
    for index, (example, shape) in enumerate(zip(examples, shapes, strict=True)):
        sizes = [DimDynamic.DYNAMIC if isinstance(d, str) else DimDynamic.STATIC for d in shape]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        source = LocalSource(f"x{index}")
        fakes.append(mode.from_tensor(example, symbolic_context=context, source=source))
        specs.append(TensorSpec(f"x{index}", shape, example.dtype, "cache" if "p" in shape else ""))
    with mode:
        module = make_fx(function, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    cached = [spec for spec in specs if "p" in spec.shape]
    out = TensorSpec("out", (), torch.float32, "logits")
    cache = CacheSpec((LayerState(),) * (len(cached) // 2))
    return Program(module, tuple(specs), (out, *cached), cache, examples)


def inputs(*shapes, batch=BATCH, queries=QUERIES, past=PAST):
    generator = torch.Generator().manual_seed(0)
    sizes = {"b": batch, "s": queries, "p": past, "t": past + queries}
    return tuple(
        torch.randn([sizes.get(d, d) for d in shape], generator=generator) for shape in shapes
    )


def count(program, target):
    return len(program.graph.find_nodes(op="call_function", target=target))
