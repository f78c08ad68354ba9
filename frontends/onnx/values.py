"""What flows between operators: tensors, small host values, sequences (lists), None."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

SMALL = 256
"""The most numbers that are computed on the host."""

DTYPES: dict[int, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    ir.DataType.FLOAT8E8M0: torch.float8_e8m0fnu,
    # torch has no arithmetic on these: a wider type carries the same values
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.UINT2: torch.uint8,
    ir.DataType.INT4: torch.int8,
    ir.DataType.INT2: torch.int8,
    ir.DataType.FLOAT4E2M1: torch.float32,
    ir.DataType.FLOAT6E2M3: torch.float32,
    ir.DataType.FLOAT6E3M2: torch.float32,
}


@dataclass(frozen=True, eq=False)
class Host:
    """Numbers (ints, floats, bools, or their symbols) or strings, as an object array.

    make gives the tensor of a weight that holds the same numbers.
    """

    values: np.ndarray
    dtype: Any
    make: Callable[[], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def numbers(self) -> list[Any]:
        return self.values.ravel().tolist()

    def tensor(self) -> Tensor:
        if self.make is not None:
            return self.make()
        numbers = self.numbers()
        if any(isinstance(n, (torch.SymInt, torch.SymFloat, torch.SymBool)) for n in numbers):
            scalars = [torch.scalar_tensor(n, dtype=self.dtype) for n in numbers]
            return torch.stack(scalars).reshape(self.shape)
        return torch.tensor(numbers, dtype=self.dtype).reshape(self.shape)


def host(values: Any, dtype: Any = torch.int64) -> Host:
    """A Host of a number, a sequence or an object array."""
    if not isinstance(values, np.ndarray):
        array = np.empty(np.shape(values) if not _flat(values) else (len(values),), dtype=object)
        array[...] = values
        values = array
    return Host(values.astype(object), dtype)


def _flat(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and not any(np.ndim(v) for v in values)


def strings(values: Any) -> Host:
    """A Host of strings; values: an array or nested lists of str."""
    return Host(np.array(values, dtype=object), str)


def is_strings(value: Any) -> bool:
    return isinstance(value, Host) and value.dtype is str


def as_tensor(value: Any) -> Any:
    """The tensor of a Host of numbers; other values as they are."""
    return value.tensor() if isinstance(value, Host) and value.dtype is not str else value


def as_numbers(value: Any) -> Any:
    """A flat list of the numbers in a value; None stays None."""
    if value is None:
        return None
    if isinstance(value, Host):
        return value.numbers()
    return value.flatten().tolist() if torch.is_tensor(value) else list(value)


def from_numpy(array: Any) -> Tensor | Host:
    """A tensor that shares the array's memory where it can; a Host for arrays of strings."""
    array = np.asarray(array)
    if array.dtype.kind in "OUS":
        text = [v.decode(errors="replace") if isinstance(v, bytes) else v for v in array.ravel()]
        return Host(np.array(text, dtype=object).reshape(array.shape), str)
    name = array.dtype.name
    if name in ("int4", "int2"):
        array = array.astype(np.int8)
    elif name in ("uint4", "uint2"):
        array = array.astype(np.uint8)
    elif name.startswith(("float4_", "float6_")):
        array = array.astype(np.float32)
    elif name.startswith(("bfloat", "float8")):
        dtype = getattr(torch, name)
        return _shared(array.view(np.dtype(f"u{array.itemsize}"))).view(dtype)
    return _shared(array)


def _shared(array: np.ndarray) -> Tensor:
    shape = array.shape
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # memory-mapped weights are read-only
        return torch.from_numpy(np.ascontiguousarray(array)).reshape(shape)


def to_numpy(value: Any, dtype: ir.DataType | None = None) -> Any:
    """Arrays for tensors and Hosts, lists for sequences, None for empty optionals.

    dtype: the ONNX type that the value stands for, where torch has only a wider one.
    """
    if isinstance(value, Host):
        return value.values if value.dtype is str else to_numpy(value.tensor(), dtype)
    if isinstance(value, (list, tuple)):
        return [to_numpy(item, dtype) for item in value]
    if torch.is_tensor(value):
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16 or "float8" in str(value.dtype):
            array = value.float().numpy().astype(getattr(ml_dtypes, str(value.dtype)[6:]))
        else:
            array = value.numpy()
        narrow = dtype is not None and dtype in DTYPES and dtype.bitwidth < 8
        return array.astype(dtype.numpy()) if narrow else array
    return value


def constant(tensor: ir.TensorProtocol) -> Tensor | Host:
    """The value of an initialiser or attribute."""
    if tensor.dtype == ir.DataType.STRING:
        text = [s.decode(errors="replace") for s in np.asarray(tensor.numpy()).ravel()]
        return Host(np.array(text, dtype=object).reshape(tensor.numpy().shape), str)
    return from_numpy(tensor.numpy())


def small(tensor: Tensor, make: Callable[[], Tensor]) -> Tensor | Host:
    """A Host for few numbers of a type that Python's numbers hold."""
    plain = not (tensor.is_complex() or "float8" in str(tensor.dtype))
    if not plain or tensor.numel() > SMALL:
        return tensor
    values = np.empty(tensor.numel(), dtype=object)
    values[:] = tensor.flatten().tolist()
    return Host(values.reshape(tuple(tensor.shape)), tensor.dtype, make)
