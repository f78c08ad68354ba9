"""Tiny random GGUF files of llama's shape."""

import gguf
import numpy as np

from regraft.kernels.linear.gguf import BYTES

WIDTH, FEED, LAYERS, HEADS, SHARED, VOCABULARY = 256, 512, 2, 4, 2, 300


def random_blocks(kind: str, rows: int, columns: int, generator, size: float = 0.05):
    """Raw bytes of random blocks whose weights are about this large."""
    if kind == "F32":
        return (generator.standard_normal((rows, columns)) * size).astype(np.float32)
    if kind in ("F16", "Q4_0", "Q4_1", "Q8_0"):
        values = generator.standard_normal((rows, columns)).astype(np.float32) * size
        return gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    blocks = generator.integers(0, 256, (rows, columns // 256, BYTES[kind]), dtype=np.uint8)
    unit = size / {"Q4_K": 200, "Q6_K": 1200}[kind]
    scales = (unit * (1 + generator.random((rows, columns // 256, 2)))).astype(np.float16)
    if kind == "Q4_K":
        scales[..., 1] *= 8
        blocks[..., :4] = scales.view(np.uint8)
    else:
        blocks[..., 208:] = scales[..., :1].copy().view(np.uint8)
    return blocks.reshape(rows, -1)


def write(path, kind="Q4_1", embedding="Q8_0", special=None, tied=True, seed=0):
    """Write the file; special: {part of a tensor's name: its kind}."""
    generator = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(SHARED)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])

    def add(name, rows, columns, own):
        chosen = next((k for part, k in (special or {}).items() if part in name), own)
        data = random_blocks(chosen, rows, columns, generator)
        kind = gguf.GGMLQuantizationType[chosen]
        writer.add_tensor(name, data, raw_dtype=None if chosen in ("F32", "F16") else kind)

    def norm(name):
        values = 1 + 0.1 * generator.standard_normal(WIDTH)
        writer.add_tensor(name, values.astype(np.float32))

    add("token_embd.weight", VOCABULARY, WIDTH, embedding)
    if not tied:
        add("output.weight", VOCABULARY, WIDTH, embedding)
    norm("output_norm.weight")
    kv = WIDTH // HEADS * SHARED
    for i in range(LAYERS):
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
        for part, rows, columns in (
            ("attn_q", WIDTH, WIDTH), ("attn_k", kv, WIDTH), ("attn_v", kv, WIDTH),
            ("attn_output", WIDTH, WIDTH), ("ffn_gate", FEED, WIDTH), ("ffn_up", FEED, WIDTH),
            ("ffn_down", WIDTH, FEED),
        ):  # fmt: skip
            add(f"blk.{i}.{part}.weight", rows, columns, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
