"""com.microsoft: fused products, activations and normalisations."""

from __future__ import annotations

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.frontends.onnx.operators.quantisation import dynamic_quantize_linear
from regraft.frontends.onnx.registry import operator

DOMAIN = "com.microsoft"


@operator("Gelu", domain=DOMAIN)
def gelu(x):
    return F.gelu(x)


@operator("BiasGelu", domain=DOMAIN)
def bias_gelu(x, bias):
    return F.gelu(x + bias)


@operator("FastGelu", domain=DOMAIN)
def fast_gelu(x, bias=None):
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("QuickGelu", domain=DOMAIN)
def quick_gelu(x, *, alpha=1.702):
    return x * torch.sigmoid(alpha * x)


@operator("FusedMatMul", domain=DOMAIN)
def fused_matmul(a, b, *, alpha=1.0, transA=0, transB=0, transBatchA=0, transBatchB=0):
    def turned(x: Tensor, batch: int, last: int) -> Tensor:
        if batch:
            x = x.movedim(0, -2)
        return x.transpose(-1, -2) if last and x.dim() > 1 else x

    return alpha * (turned(a, transBatchA, transA) @ turned(b, transBatchB, transB))


@operator("MatMulNBits", domain=DOMAIN)
def matmul_nbits(
    x, packed, scales, zeros=None, order=None, bias=None, *, K, N, bits=4, block_size,
    accuracy_level=0, weight_prepacked=0,
):  # fmt: skip
    blocks = -(-K // block_size)
    codes = _unpacked(packed.reshape(N, blocks, -1), bits).to(scales.dtype)
    scales = scales.reshape(N, blocks, 1)
    if zeros is None:
        middle = torch.full_like(scales, 2 ** (bits - 1))
    elif zeros.dtype == torch.uint8:
        middle = _unpacked(zeros.reshape(N, -1), bits)[:, :blocks, None].to(scales.dtype)
    else:
        middle = zeros.reshape(N, blocks, 1)
    if order is not None:
        flat, group = codes.flatten(1)[:, :K], order[:K].long()
        weight = (flat - middle[:, group, 0]) * scales[:, group, 0]
    else:
        weight = ((codes - middle) * scales).flatten(1)[:, :K]
    return F.linear(x, weight.to(x.dtype), bias)


@operator("GatherBlockQuantized", domain=DOMAIN)
def gather_block_quantized(
    data, indices, scales, zeros=None, *, bits=4, block_size=128, gather_axis=0, quantize_axis=1,
    types,
):  # fmt: skip
    if gather_axis != 0 or quantize_axis % data.dim() != data.dim() - 1:
        raise NotImplementedError("other axes than the first to gather, the last in blocks")
    whole = types[0] == ir.DataType.UINT8
    codes = _unpacked(data[indices], bits) if whole else data[indices]
    codes, scales = codes.to(scales.dtype), scales[indices]
    middle = torch.full_like(scales, 2 ** (bits - 1) if whole else 0)
    if zeros is not None:
        middle = _unpacked(zeros[indices], bits) if whole else zeros[indices]
        middle = middle[..., : scales.shape[-1]].to(scales.dtype)
    size = codes.shape[-1]
    scales, middle = (x.repeat_interleave(block_size, -1)[..., :size] for x in (scales, middle))
    return (codes - middle) * scales


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """The codes in bytes, lowest bits first, along the last dimension."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


@operator("DynamicQuantizeMatMul", domain=DOMAIN)
def dynamic_quantize_matmul(a, b, b_scale, b_zero=None, bias=None):
    codes, scale, zero = dynamic_quantize_linear(a)
    return matmul_integer_to_float(codes, b, scale, b_scale, zero, b_zero, bias)


@operator("MatMulIntegerToFloat", domain=DOMAIN)
def matmul_integer_to_float(a, b, a_scale, b_scale, a_zero=None, b_zero=None, bias=None):
    left, right = a.to(torch.int32), b.to(torch.int32)
    left = left if a_zero is None else left - a_zero.to(torch.int32)
    right = right if b_zero is None else right - b_zero.to(torch.int32)
    y = (left @ right).to(a_scale.dtype) * (a_scale * b_scale)
    return y if bias is None else y + bias


@operator("SimplifiedLayerNormalization")
@operator("SimplifiedLayerNormalization", domain=DOMAIN)
def simplified_layer_normalization(x, scale, *, axis=-1, epsilon=1e-5, stash_type=1):
    dims = tuple(range(axis % x.dim(), x.dim()))
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    deviation = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    return (wide * deviation).to(x.dtype) * scale, deviation


def _normal(x: Tensor, scale: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], scale, bias, epsilon)


@operator("SkipLayerNormalization", domain=DOMAIN)
def skip_layer_normalization(x, skip, scale, shift=None, bias=None, *, epsilon=1e-12):
    total = x + skip if bias is None else x + skip + bias
    return _normal(total, scale, shift, epsilon), None, None, total


@operator("SkipSimplifiedLayerNormalization", domain=DOMAIN)
def skip_simplified_layer_normalization(x, skip, scale, bias=None, *, epsilon=1e-12):
    total = x + skip if bias is None else x + skip + bias
    y, deviation = simplified_layer_normalization(total, scale, epsilon=epsilon)
    return y, None, deviation, total


@operator("EmbedLayerNormalization", domain=DOMAIN)
def embed_layer_normalization(
    ids, segments, words, places, kinds, scale, shift, mask=None, positions=None, *,
    epsilon=1e-12, mask_index_type=0,
):  # fmt: skip
    positions = torch.arange(ids.shape[1])[None] if positions is None else positions
    total = words[ids] + places[positions]
    if segments is not None and kinds is not None:
        total = total + kinds[segments]
    count = ids.new_zeros(ids.shape[0]) if mask is None else mask.sum(1)
    return _normal(total, scale, shift, epsilon), count.to(torch.int32), total
