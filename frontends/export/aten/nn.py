"""Layers: products, activations, normalisations, convolutions."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch

from regraft.frontends.export.builder import TORCH, Builder, Size, lowers, rank
from regraft.kernels.attention import onnx


@lowers("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot")
def matmul(b: Builder, x: ir.Value, y: ir.Value) -> Any:
    return b.op("MatMul", b.to(x), b.to(y))


@lowers("aten.linear")
def linear(b: Builder, x: ir.Value, weight: ir.Value, bias: Any = None) -> Any:
    out = b.op("MatMul", x, b.transposed(weight))
    return out if bias is None else b.op("Add", out, bias)


@lowers("aten.addmm", "aten.baddbmm")
def addmm(b: Builder, bias: ir.Value, x: ir.Value, y: ir.Value, *, beta=1, alpha=1) -> Any:
    product = b.op("MatMul", x, y)
    if alpha != 1:
        product = b.op("Mul", product, b.to(alpha))
    return b.op("Add", product, bias if beta == 1 else b.op("Mul", bias, b.to(beta)))


@lowers("aten.einsum")
def einsum(b: Builder, equation: str, tensors: list[ir.Value], **_: Any) -> Any:
    return b.op("Einsum", *tensors, equation=equation)


@lowers("aten.outer")
def outer(b: Builder, x: ir.Value, y: ir.Value) -> Any:
    return b.op("Mul", b.unsqueeze(x, 1), b.unsqueeze(y, 0))


@lowers("aten.silu")
def silu(b: Builder, x: Any) -> Any:
    return b.op("Mul", x, b.op("Sigmoid", x))


@lowers("aten.gelu")
def gelu(b: Builder, x: ir.Value, *, approximate: str = "none") -> Any:
    if b.opset >= 20:
        return b.op("Gelu", x, approximate=approximate)
    half = b.op("Mul", x, b.to(0.5))
    if approximate == "none":
        inner = b.op("Erf", b.op("Mul", x, b.to(math.sqrt(0.5))))
    else:
        cube = b.op("Mul", b.op("Mul", x, x), x)
        inner = b.op("Add", x, b.op("Mul", cube, b.to(0.044715)))
        inner = b.op("Tanh", b.op("Mul", inner, b.to(math.sqrt(2 / math.pi))))
    return b.op("Mul", half, b.op("Add", inner, b.to(1.0)))


@lowers("aten.softplus")
def softplus(b: Builder, x: ir.Value, beta: Any = 1, threshold: Any = 20) -> Any:
    if beta == 1:
        return b.op("Softplus", x)
    return b.op("Div", b.op("Softplus", b.op("Mul", x, b.to(beta))), b.to(beta))


@lowers("aten.elu")
def elu(b: Builder, x: ir.Value, alpha: float = 1.0, *_: Any) -> Any:
    return b.op("Elu", x, alpha=float(alpha))


@lowers("aten.leaky_relu")
def leaky_relu(b: Builder, x: ir.Value, slope: float = 0.01) -> Any:
    return b.op("LeakyRelu", x, alpha=float(slope))


@lowers("aten.relu6")
def relu6(b: Builder, x: ir.Value) -> Any:
    return b.op("Min", b.op("Relu", x), b.to(6))


@lowers("aten.hardtanh")
def hardtanh(b: Builder, x: ir.Value, low: float = -1.0, high: float = 1.0) -> Any:
    return b.op("Min", b.op("Max", x, b.to(low)), b.to(high))


@lowers("aten.hardsigmoid")
def hardsigmoid(b: Builder, x: ir.Value) -> Any:
    return b.op("HardSigmoid", x, alpha=1 / 6)


@lowers("aten.hardswish")
def hardswish(b: Builder, x: ir.Value) -> Any:
    return b.op("HardSwish", x)


@lowers("aten.mish")
def mish(b: Builder, x: ir.Value) -> Any:
    return b.op("Mul", x, b.op("Tanh", b.op("Softplus", x)))


@lowers("aten.glu")
def glu(b: Builder, x: ir.Value, dim: int = -1) -> Any:
    first, second = b.op("Split", x, outputs=2, axis=dim, num_outputs=2)
    return b.op("Mul", first, b.op("Sigmoid", second))


@lowers("aten.logsigmoid", "aten.log_sigmoid")
def log_sigmoid(b: Builder, x: ir.Value) -> Any:
    return b.op("Neg", b.op("Softplus", b.op("Neg", x)))


@lowers("aten.layer_norm")
def layer_norm(
    b: Builder, x: ir.Value, sizes: list[int], weight=None, bias=None, eps=1e-5, *_: Any
):
    weight = b.constant(torch.ones(sizes), b.dtype) if weight is None else weight
    return b.op("LayerNormalization", x, weight, bias, axis=-len(sizes), epsilon=eps)


@lowers("aten.native_layer_norm")
def native_layer_norm(b: Builder, x: ir.Value, sizes: list[int], weight, bias, eps) -> Any:
    return [layer_norm(b, x, sizes, weight, bias, eps), None, None]


@lowers("aten.rms_norm")
def rms_norm(b: Builder, x: ir.Value, sizes: list[int], weight=None, eps=None) -> Any:
    axes = b.constant(list(range(-len(sizes), 0)))
    if eps is None:
        eps = torch.finfo(TORCH[x.dtype]).eps
    square = b.op("ReduceMean", b.op("Mul", x, x), axes, keepdims=1)
    normal = b.op("Div", x, b.op("Sqrt", b.op("Add", square, b.to(eps))))
    return normal if weight is None else b.op("Mul", normal, weight)


@lowers("aten.group_norm")
def group_norm(b: Builder, x: ir.Value, groups: int, weight=None, bias=None, eps=1e-5, *_: Any):
    sizes = [Size(b.size(x, d)) for d in range(rank(x))]
    rows = b.reshape(x, [sizes[0], groups, -1])
    ones, zeros = (b.constant([float(n)] * groups, b.dtype) for n in (1, 0))
    normal = b.op("InstanceNormalization", rows, ones, zeros, epsilon=eps)
    normal = b.reshape(normal, sizes)
    wide = [-1] + [1] * (rank(x) - 2)
    if weight is not None:
        normal = b.op("Mul", normal, b.reshape(weight, wide))
    return normal if bias is None else b.op("Add", normal, b.reshape(bias, wide))


@lowers("aten.batch_norm", "aten._native_batch_norm_legit_no_training")
def batch_norm(b: Builder, x: ir.Value, weight, bias, mean, var, *rest: Any) -> Any:
    eps = next(n for n in reversed(rest) if isinstance(n, float) and not isinstance(n, bool))
    return b.op("BatchNormalization", x, weight, bias, mean, var, epsilon=eps)


@lowers("aten.convolution", "aten.conv1d", "aten.conv2d", "aten.conv3d")
def convolution(
    b: Builder,
    x: ir.Value,
    weight: ir.Value,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    *rest: Any,
) -> Any:
    dims = rank(x) - 2
    transposed, out_padding, groups = rest if len(rest) == 3 else (False, 0, rest[0] if rest else 1)
    if isinstance(padding, str):
        raise NotImplementedError(f"a convolution with padding {padding}")
    name = "ConvTranspose" if transposed else "Conv"
    return b.op(
        *(name, x, weight, bias),
        strides=_each(stride, dims), pads=_each(padding, dims) * 2, dilations=_each(dilation, dims),
        group=groups, output_padding=_each(out_padding, dims) if transposed else None,
    )  # fmt: skip


@lowers("aten.conv_transpose1d", "aten.conv_transpose2d")
def conv_transpose(
    b: Builder, x: ir.Value, weight, bias=None, stride=1, padding=0, extra=0, groups=1, dilation=1
) -> Any:
    return convolution(b, x, weight, bias, stride, padding, dilation, True, extra, groups)


def _each(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


@lowers("aten.max_pool2d", "aten.max_pool1d")
def max_pool(b: Builder, x: ir.Value, kernel, stride=(), padding=0, dilation=1, ceil=False) -> Any:
    dims = rank(x) - 2
    return b.op(
        *("MaxPool", x), kernel_shape=_each(kernel, dims), strides=_each(stride or kernel, dims),
        pads=_each(padding, dims) * 2, dilations=_each(dilation, dims), ceil_mode=int(ceil),
    )  # fmt: skip


@lowers("aten.avg_pool2d", "aten.avg_pool1d")
def avg_pool(
    b: Builder, x: ir.Value, kernel, stride=(), padding=0, ceil=False, count=True, *_: Any
):
    dims = rank(x) - 2
    return b.op(
        *("AveragePool", x), kernel_shape=_each(kernel, dims),
        strides=_each(stride or kernel, dims), pads=_each(padding, dims) * 2,
        ceil_mode=int(ceil), count_include_pad=int(count),
    )  # fmt: skip


@lowers("aten.scaled_dot_product_attention")
def scaled_dot_product_attention(
    b: Builder, q: ir.Value, k: ir.Value, v: ir.Value, mask=None, dropout=0.0, causal=False,
    *, scale=None, enable_gqa=False,
) -> Any:  # fmt: skip
    scale = int(q.shape[-1]) ** -0.5 if scale is None else scale  # type: ignore[index, arg-type]
    if causal:
        sizes = [b.size(x, rank(x) - 2) for x in (q, k)]
        mask = onnx.causal_mask(b, None, *sizes, b.constant([0]), b.constant([1]), 0)
        mask = b.squeeze(mask, 0, 1)
    if all(rank(x) == 4 and isinstance(x.shape[1], int) for x in (q, k, v)):  # type: ignore[index]
        return onnx.attention(b, q, k, v, mask, None, scale, 0.0, False)
    if enable_gqa:
        raise NotImplementedError("attention of groups in other than 4 dimensions")
    last = [*range(rank(k) - 2), rank(k) - 1, rank(k) - 2]
    scores = b.op("MatMul", b.op("Mul", q, b.to(scale)), b.transpose(k, *last))
    if mask is not None:
        scores = onnx.masked(b, scores, mask)
    return b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
