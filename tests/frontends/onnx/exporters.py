"""Small language models as other exporters write them."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

HEADS, SHARED, SIZE, VOCAB, WIDTH = 4, 2, 16, 256, 64
F, INT = TensorProto.FLOAT, TensorProto.INT64
MICROSOFT = "com.microsoft"


class Step(torch.nn.Module):
    """A model with a cache as tensors, as optimum has it; places: it is told positions."""

    def __init__(self, model, places: bool) -> None:
        super().__init__()
        self.model, self.places = model, places

    def forward(self, input_ids, attention_mask, *rest):
        extra = {"position_ids": rest[0]} if self.places else {}
        states = rest[self.places :]
        cache = DynamicCache()
        for key, value in zip(states[::2], states[1::2], strict=True):
            layer = DynamicLayer()
            layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
            layer.keys, layer.values = key, value
            cache.layers.append(layer)
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, **extra
        )
        made = out.past_key_values.layers
        return out.logits, *(state for layer in made for state in (layer.keys, layer.values))


def by_torch(model, folder, *, dynamo=True, places=True, opset=20):
    """The names of optimum, by torch's exporter or its predecessor."""
    folder.mkdir()
    layers = model.config.num_hidden_layers
    kinds = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    past = [torch.randn(2, SHARED, 7, SIZE) for _ in kinds]
    ids, mask = torch.randint(3, 200, (2, 3)), torch.ones(2, 10, dtype=torch.long)
    positions = [torch.arange(7, 10).repeat(2, 1)] if places else []
    inputs = ["input_ids", "attention_mask", "position_ids"][: 2 + places]
    pasts = [f"past_key_values.{kind}" for kind in kinds]
    names = [*inputs, *pasts]
    outputs = ["logits", *(f"present.{kind}" for kind in kinds)]
    settings = {"input_names": names, "output_names": outputs, "opset_version": opset}
    if dynamo:
        auto = torch.export.Dim.AUTO
        rest = tuple({0: auto, 1 if name in inputs else 2: auto} for name in names[2:])
        settings["dynamic_shapes"] = ({0: auto, 1: auto}, {0: auto, 1: auto}, rest)
    else:
        axes = {name: {0: "batch", 2: "past"} for name in pasts}
        axes |= {name: {0: "batch", 1: f"{name}_length"} for name in [*inputs, "logits"]}
        axes |= {name: {0: "batch", 2: "total"} for name in outputs[1:]}
        settings["dynamic_axes"] = axes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = (ids, mask, *positions, *past)
        path = str(folder / "model.onnx")
        torch.onnx.export(Step(model, places), args, path, dynamo=dynamo, verbose=False, **settings)
    model.config.save_pretrained(folder)
    return folder


def by_genai(model, folder, precision):
    """onnxruntime-genai's model builder, which leaves no config.json."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    source = folder.with_name(f"{folder.name}-source")
    model.save_pretrained(source)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t1"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0").save_pretrained(source)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", folder]
    cache = folder.with_name("cache")
    subprocess.run(
        [*command, "-p", precision, "-e", "cpu", "-c", cache, "--extra_options", "hf_token=false"],
        check=True,
        capture_output=True,
    )
    return folder


class Graph:
    """A language model of one attention layer, written node by node."""

    def __init__(self) -> None:
        self.nodes, self.weights = [], []
        self.random = np.random.default_rng(0)

    def op(self, kind, *inputs, outputs=1, domain="", **attributes):
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        made = helper.make_node(kind, list(inputs), names, domain=domain, **attributes)
        self.nodes.append(made)
        return names[0] if outputs == 1 else names

    def held(self, array):
        self.weights.append(numpy_helper.from_array(np.asarray(array), f"w{len(self.weights)}"))
        return self.weights[-1].name

    def weight(self, *shape):
        return self.held(self.random.normal(size=shape).astype(np.float32) / 6)

    def product(self, x, size, width=WIDTH):
        return self.op("MatMul", x, self.weight(width, size))

    def tables(self, length=512, pairs=SIZE // 2):
        angles = np.arange(length)[:, None] * 100.0 ** (-np.arange(pairs) / pairs)
        return [self.held(f(angles).astype(np.float32)) for f in (np.cos, np.sin)]

    def counts(self):
        """The last key of each row, and how many there are."""
        summed = self.op("ReduceSum", "attention_mask", self.held(np.array([1])), keepdims=0)
        last = self.op("Cast", self.op("Sub", summed, self.held(np.array(1))), to=TensorProto.INT32)
        shape = self.op("Shape", "attention_mask")
        total = self.op("Gather", shape, self.held(np.array(1)), axis=0)
        return last, self.op("Cast", total, to=TensorProto.INT32)

    def places(self):
        """position_ids as models without them compute them from the mask."""
        ones = self.held(np.array([1]))
        summed = self.op("CumSum", "attention_mask", self.held(np.array(1)))
        places = self.op("Sub", summed, ones)
        places = self.op("Max", places, self.held(np.array([0])))
        length = self.op("Shape", "input_ids", start=1, end=2)
        first = self.op("Neg", length)
        last = self.held(np.array([2**31]))
        return self.op("Slice", places, first, last, ones)

    def bias(self):
        """0 where a query sees a key, the lowest float elsewhere [batch, 1, queries, keys]."""
        length = self.op("Shape", "input_ids", start=1, end=2)
        total = self.op("Shape", "attention_mask", start=1, end=2)
        one, zero = self.held(np.array(1)), self.held(np.array(0))
        keys = self.op("Range", zero, self.op("Squeeze", total), one)
        rows = self.op("Range", zero, self.op("Squeeze", length), one)
        rows = self.op("Add", rows, self.op("Sub", total, length))
        causal = self.op("LessOrEqual", keys, self.op("Unsqueeze", rows, self.held(np.array([1]))))
        real = self.op("Cast", "attention_mask", to=TensorProto.BOOL)
        real = self.op("Unsqueeze", real, self.held(np.array([1, 2])))
        seen = self.op("And", causal, real)
        lowest = np.float32(np.finfo(np.float32).min)
        return self.op("Where", seen, self.held(np.float32(0)), self.held(lowest))

    def save(self, folder, attend, shared=SHARED, opset=23, places=False):
        """attend(graph, x) -> attended values, present key and value."""
        table = self.weight(VOCAB, WIDTH)
        x = self.op("Gather", table, "input_ids")
        out, *present = attend(self, x)
        x = self.op("Add", x, self.product(out, WIDTH))
        logits = self.product(x, VOCAB)
        for made, name in zip((logits, *present), ("logits", "present.0.key", "present.0.value"),
                              strict=True):  # fmt: skip
            self.nodes.append(helper.make_node("Identity", [made], [name]))
        info = helper.make_tensor_value_info
        ids = ["input_ids", *(["position_ids"] if places else [])]
        graph = helper.make_graph(
            self.nodes, "g",
            [
                *(info(name, INT, ["batch", "length"]) for name in ids),
                info("attention_mask", INT, ["batch", "total"]),
                *(info(f"past_key_values.0.{kind}", F, ["batch", shared, "past", SIZE])
                  for kind in ("key", "value")),
            ],
            [
                info("logits", F, ["batch", "length", VOCAB]),
                *(info(f"present.0.{kind}", F, ["batch", shared, "total", SIZE])
                  for kind in ("key", "value")),
            ],
            self.weights,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
        folder.mkdir()
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10),
                  folder / "model.onnx")  # fmt: skip
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, num_attention_heads=HEADS, head_dim=SIZE,
            num_key_value_heads=shared, num_hidden_layers=1, eos_token_id=None, bos_token_id=None,
        ).save_pretrained(folder)  # fmt: skip
        return folder


PAST = "past_key_values.0.key", "past_key_values.0.value"


def grouped(packed=False, rotary=True, sinks=False, norms=False, **settings):
    """GroupQueryAttention of com.microsoft."""

    def attend(g, x):
        sizes = [HEADS * SIZE, SHARED * SIZE, SHARED * SIZE]
        given = [g.product(x, sum(sizes)), "", ""] if packed else [g.product(x, n) for n in sizes]
        tables = g.tables() if rotary else ["", ""]
        inputs = [*given, *PAST, *g.counts(), *tables]
        if sinks:
            inputs += ["", "", g.weight(HEADS)]
        if norms:
            inputs += [""] * (14 - len(inputs)) + [g.weight(SIZE), g.weight(SIZE)]
        return g.op(
            "GroupQueryAttention", *inputs, outputs=3, domain=MICROSOFT, num_heads=HEADS,
            kv_num_heads=SHARED, do_rotary=int(rotary), **settings,
        )  # fmt: skip

    return attend


def multi_head(g, x):
    """MultiHeadAttention and RotaryEmbedding of com.microsoft."""
    places, tables = g.places(), g.tables()
    q, k, v = (g.product(x, HEADS * SIZE) for _ in range(3))
    q, k = (
        g.op("RotaryEmbedding", t, places, *tables, domain=MICROSOFT, num_heads=HEADS)
        for t in (q, k)
    )
    return g.op(
        "MultiHeadAttention", q, k, v, "", "", g.bias(), *PAST, outputs=3, domain=MICROSOFT,
        num_heads=HEADS,
    )  # fmt: skip


def standard(interleaved=0, **settings):
    """Attention and RotaryEmbedding of ONNX itself."""

    def attend(g, x):
        tables = g.tables()
        q, k, v = (g.product(x, n * SIZE) for n in (HEADS, SHARED, SHARED))
        turn = {"interleaved": interleaved}
        q = g.op("RotaryEmbedding", q, *tables, "position_ids", num_heads=HEADS, **turn)
        k = g.op("RotaryEmbedding", k, *tables, "position_ids", num_heads=SHARED, **turn)
        return g.op(
            "Attention", q, k, v, g.bias(), *PAST, outputs=3, q_num_heads=HEADS,
            kv_num_heads=SHARED, **settings,
        )  # fmt: skip

    return attend
