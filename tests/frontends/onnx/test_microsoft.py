"""Operators of com.microsoft against onnxruntime."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from regraft.frontends.onnx.module import OnnxModule

random = np.random.default_rng(0)


def floats(*shape):
    return random.standard_normal(shape, dtype=np.float32)


def integers(high, *shape, dtype=np.int64):
    return random.integers(0, high, shape).astype(dtype)


def rows(length, size):
    angles = np.arange(length)[:, None] * 0.1 ** np.arange(size)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


COS, SIN = rows(16, 4)
WIDE = rows(16, 8)
LAST = np.array([6, 6], np.int32)
SHORT = np.array([6, 4], np.int32)
TOTAL = np.array(7, np.int32)
STEP = [floats(2, 1, 64), floats(2, 1, 32), floats(2, 1, 32)]
PAST = [floats(2, 2, 6, 16), floats(2, 2, 6, 16)]
PROMPT = [floats(2, 7, 32), floats(2, 7, 16), floats(2, 7, 16)]
NONE = [np.zeros((2, 2, 0, 8), np.float32)] * 2
GROUPED = dict(num_heads=4, kv_num_heads=2)
NBITS = dict(K=40, N=6, block_size=16)
WHOLE = [floats(2, 5, 32) for _ in range(3)]

CASES = {
    "gelu": ("Gelu", [floats(3, 4)], {}, 1),
    "bias gelu": ("BiasGelu", [floats(3, 4), floats(4)], {}, 1),
    "fast gelu": ("FastGelu", [floats(3, 4), floats(4)], {}, 1),
    "quick gelu": ("QuickGelu", [floats(3, 4)], {"alpha": 1.5}, 1),
    "fused product": ("FusedMatMul", [floats(2, 4, 3), floats(2, 5, 4)],
                      dict(transA=1, transB=1, alpha=0.5), 1),
    "4 bits": ("MatMulNBits", [floats(2, 40), integers(256, 6, 3, 8, dtype=np.uint8),
                               floats(18)], dict(NBITS, bits=4), 1),
    "4 bits, zeros": ("MatMulNBits", [floats(2, 40), integers(256, 6, 3, 8, dtype=np.uint8),
                      floats(18), integers(256, 12, dtype=np.uint8)], dict(NBITS, bits=4), 1),
    "8 bits": ("MatMulNBits", [floats(2, 40), integers(256, 6, 3, 16, dtype=np.uint8),
                               floats(18)], dict(NBITS, bits=8), 1),
    "rows of 4 bits": ("GatherBlockQuantized", [integers(256, 5, 20, dtype=np.uint8),
                       integers(5, 2, 3), floats(5, 3)], dict(bits=4, block_size=16), 1),
    "rows of 8 bits, zeros": ("GatherBlockQuantized", [integers(256, 5, 40, dtype=np.uint8),
                              integers(5, 2, 3), floats(5, 3), integers(256, 5, 3, dtype=np.uint8)],
                              dict(bits=8, block_size=16), 1),
    "dynamic product": ("DynamicQuantizeMatMul", [floats(3, 8), integers(255, 8, 4, dtype=np.uint8),
                        floats(4), integers(255, 4, dtype=np.uint8), floats(4)], {}, 1),
    "integers to float": ("MatMulIntegerToFloat", [integers(255, 3, 8, dtype=np.uint8),
                          integers(255, 8, 4, dtype=np.uint8), floats(1), floats(4),
                          integers(255, 1, dtype=np.uint8)], {}, 1),
    "skip": ("SkipLayerNormalization", [floats(2, 3, 8), floats(2, 3, 8), floats(8), floats(8),
                                        floats(8)], {"epsilon": 1e-5}, (0, 3)),
    "skip, simplified": ("SkipSimplifiedLayerNormalization", [floats(2, 3, 8), floats(2, 3, 8),
                         floats(8)], {"epsilon": 1e-5}, (0, 3)),
    "embedding": ("EmbedLayerNormalization", [integers(9, 2, 3, dtype=np.int32),
                  integers(2, 2, 3, dtype=np.int32), floats(9, 8), floats(5, 8), floats(2, 8),
                  floats(8), floats(8), np.array([[1, 1, 1], [1, 1, 0]], np.int32)], {}, 2),
    "rotary": ("RotaryEmbedding", [floats(2, 5, 32), np.array([3]), COS, SIN], {}, 1),
    "rotary, pairs": ("RotaryEmbedding", [floats(2, 4, 5, 8), np.arange(5)[None].repeat(2, 0),
                      COS, SIN], {"interleaved": 1}, 1),
    "heads": ("MultiHeadAttention", WHOLE, {"num_heads": 4}, 1),
    "heads, bias and padding": ("MultiHeadAttention", [*WHOLE, floats(96),
                                np.array([5, 3], np.int32)], {"num_heads": 4}, 1),
    "heads, causal": ("MultiHeadAttention", WHOLE, dict(num_heads=4, unidirectional=1), 1),
    "groups, prompt": ("GroupQueryAttention", [*PROMPT, *NONE, LAST, TOTAL], GROUPED, 3),
    "groups, step": ("GroupQueryAttention", [*STEP, *PAST, LAST, TOTAL, *WIDE],
                     dict(GROUPED, do_rotary=1), 3),
    "groups, lengths": ("GroupQueryAttention", [*STEP, *PAST, SHORT, TOTAL, *WIDE],
                        dict(GROUPED, do_rotary=1), 3),
    "groups, window": ("GroupQueryAttention", [*STEP, *PAST, LAST, TOTAL],
                       dict(GROUPED, local_window_size=3, softcap=5.0), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_onnxruntime(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    operator, inputs, attributes, wanted = CASES[name]
    kept = range(wanted) if isinstance(wanted, int) else wanted
    outputs = [f"y{i}" if i in kept else "" for i in range(max(kept) + 1)]
    names = [f"x{i}" for i in range(len(inputs))]
    node = helper.make_node(operator, names, outputs, domain="com.microsoft", **attributes)
    held = [(n, x) for n, x in zip(names, inputs, strict=True)]
    fixed = ("MatMulNBits", "EmbedLayerNormalization", "RotaryEmbedding")
    split = 1 if operator in fixed else len(held)
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in held[:split]
        ],
        [onnx.helper.make_empty_tensor_value_info(n) for n in outputs if n],
        [numpy_helper.from_array(x, n) for n, x in held[split:]],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    expected = session.run(None, dict(held[:split]))
    with torch.no_grad():
        found = OnnxModule(model)(*(torch.from_numpy(x.copy()) for _, x in held[:split]))
    found = found if isinstance(found, tuple) else (found,)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-3, atol=1e-4)
