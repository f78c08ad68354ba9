"""Matrix products."""

from __future__ import annotations

import torch

from regraft.frontends.onnx.registry import operator


@operator("MatMul", widen=True)
def matmul(a, b):
    return torch.matmul(a, b)


@operator("Gemm", widen=True)
def gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0):
    a = a.t() if transA else a
    if transB and alpha == beta == 1.0 and c is not None and c.dim() == 1:
        return torch.nn.functional.linear(a, b, c)
    product = a @ (b.t() if transB else b)
    if not product.is_floating_point():
        alpha, beta = int(alpha), int(beta)
    product = product if alpha == 1 else product * alpha
    if c is None:
        return product
    return product + (c if beta == 1 else c * beta)


@operator("Einsum")
def einsum(*inputs, equation):
    return torch.einsum(equation.replace(" ", ""), *inputs)


@operator("MatMulInteger")
def matmul_integer(a, b, a_zero=None, b_zero=None):
    a, b = a.to(torch.int32), b.to(torch.int32)
    if a_zero is not None:
        a = a - (a_zero[..., None] if a_zero.numel() > 1 else a_zero).to(torch.int32)
    if b_zero is not None:
        b = b - b_zero.to(torch.int32)
    return torch.matmul(a, b)
