"""The kernels that quantise and pack whole blocks, a task for each block of a sequence."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from regraft.kernels.kvquant.llvm.block import TOKENS, Shape
from regraft.kernels.kvquant.llvm.key_block import KeyBlock
from regraft.kernels.kvquant.llvm.simd import parallel
from regraft.kernels.kvquant.llvm.value_block import ValueBlock


def make(shape: Shape) -> Any:
    """The PrimFunc ``quantize``; its arguments are those of ``_arguments``, in order."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("quantize")
            a = _arguments(shape)
            with parallel(a.batch * a.blocks) as task:
                (KeyBlock if shape.kind == "key" else ValueBlock)(shape, a, task).run()
    return builder.get().with_attr("global_symbol", "quantize")


class _Arguments:
    pass


def _arguments(shape: Shape) -> Any:
    a: Any = _Arguments()
    heads, size, count = shape.heads, shape.size, shape.count
    batch, blocks, scales, groups = (T.int64() for _ in range(4))
    a.batch, a.blocks, a.scales = batch, blocks, scales

    def tensor(name: str, dims: tuple[Any, ...], dtype: str, strides: Any = None) -> None:
        dims = tuple(T.int64(d) if isinstance(d, int) else d for d in dims)
        handle = T.arg(name, T.handle())
        setattr(a, name, T.match_buffer(handle, dims, dtype, strides=strides, align=1))

    strides = [*(T.int64() for _ in range(3)), T.int64(1)]
    tensor("x", (batch, heads, T.int64(), size), "float32", strides)
    tensor("codes", (batch, heads, blocks, TOKENS * size * shape.bits // 8), "uint8")
    tensor("midpoints", (2**shape.bits - 1,), "float32")
    tensor("levels", (2**shape.bits,), "int8")
    a.unit = T.arg("unit", T.float32())
    if shape.kind == "key":
        a.group = T.arg("group", T.int64())
    affine = (scales, heads, groups, size) if shape.kind == "key" else (batch, blocks, TOKENS)
    tensor("scale", affine, "float16")
    tensor("zero", affine, "float16")
    if shape.feedback:
        tensor("matrix", (heads, size, size), "float32")
    if shape.feedback and shape.kind == "key":
        tensor("weight", (1, heads, 1, size), "float16")
    if count:
        tensor("outliers", (batch, blocks, TOKENS * count), "int32")
        tensor("offsets", (batch, blocks, heads + 1), "int32")
    return a
