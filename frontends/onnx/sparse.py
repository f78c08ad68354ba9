"""Sparse initialisers, made dense."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from regraft.program import RegraftError

MOST_BYTES = 2**30
"""Of all sparse initialisers of a model together, once dense."""


def densified(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its graph's sparse initialisers as dense ones; the same if it has none."""
    if not proto.graph.sparse_initializer:
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    left = MOST_BYTES
    for sparse in copy.graph.sparse_initializer:
        made = _dense(sparse, left)
        left -= len(made.raw_data)
        copy.graph.initializer.append(made)
    copy.graph.ClearField("sparse_initializer")
    return copy


def _dense(sparse: onnx.SparseTensorProto, most: int) -> TensorProto:
    where = f"sparse initialiser {sparse.values.name!r}"
    dims = list(sparse.dims)
    parts = (sparse.values, sparse.indices)
    if any(part.data_location == TensorProto.EXTERNAL for part in parts):
        raise RegraftError(f"{where} has external data: store it dense")
    if sparse.values.data_type == TensorProto.STRING:
        raise RegraftError(f"{where} holds strings: store it dense")
    try:
        values, indices = (numpy_helper.to_array(part) for part in parts)
    except Exception as error:
        raise RegraftError(f"{where} is damaged: export it again") from error
    count = math.prod(dims)
    if min(dims, default=0) < 0 or count * values.itemsize > most:
        raise RegraftError(f"{where} of {dims} takes more than {most} bytes dense: make it smaller")
    places = len(values) if values.ndim == 1 else -1
    if indices.dtype != np.int64 or indices.shape not in ((places,), (places, len(dims))):
        raise RegraftError(f"{where}: {values.shape} values do not fit {indices.shape} indices")
    sizes = np.array(dims if indices.ndim == 2 else [count], np.int64)
    wide = indices.reshape(places, len(sizes))
    if (wide < 0).any() or (wide >= sizes).any():
        raise RegraftError(f"{where} has an index outside of {dims}: export it again")
    flat = np.ravel_multi_index(tuple(wide.T), tuple(sizes)) if len(sizes) else 0
    dense = np.zeros(count, values.dtype)
    dense[flat] = values
    return numpy_helper.from_array(dense.reshape(dims), sparse.values.name)
