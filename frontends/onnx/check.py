"""What a ModelProto must satisfy before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx import AttributeProto, TensorProto

from regraft.program import RegraftError

DEEPEST = 64
MOST_NODES = 1_000_000
"""Nodes of a model whose functions are written out."""

_FIELDS: dict[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.COMPLEX128: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.STRING: "string_data",
}


class Checker:
    """Checks names, order, nesting and tensors; RegraftError names the first that is wrong.

    folder: where external data may lie, None where there is none. unsorted: some node reads what
    a later one makes. maps: some output is a map.
    """

    def __init__(self, proto: onnx.ModelProto, folder: Path | None) -> None:
        self.proto, self.folder = proto, folder
        self.unsorted = self.maps = False

    def check(self) -> None:
        graph = self.proto.graph
        self.maps = any(is_map(info.type) for info in [*graph.output, *graph.value_info])
        self._graph(graph, set(), 1)
        for function in self.proto.functions:
            where = f"function {function.name!r}"
            self._nodes(function.node, where, set(function.input), function.output, set(), 1)
        _check_calls(self.proto)

    def _graph(self, graph: onnx.GraphProto, outer: set[str], depth: int) -> None:
        where = f"graph {graph.name!r}"
        if depth > DEEPEST:
            raise RegraftError(f"{where}: graphs nest deeper than {DEEPEST}: flatten their bodies")
        if graph.sparse_initializer:
            raise RegraftError(f"{where} has sparse initialisers: store them dense")
        for tensor in graph.initializer:
            self._tensor(tensor, f"initialiser {tensor.name!r}")
        inputs = _unique([info.name for info in graph.input], where, "inputs")
        held = _unique([tensor.name for tensor in graph.initializer], where, "initialisers")
        outputs = [info.name for info in graph.output]
        self._nodes(graph.node, where, inputs | held, outputs, outer, depth)

    def _nodes(
        self,
        nodes: Sequence[onnx.NodeProto],
        where: str,
        known: set[str],
        outputs: Iterable[str],
        outer: set[str],
        depth: int,
    ) -> None:
        makers: dict[str, int] = {}
        for index, node in enumerate(nodes):
            _check_text(node, where)
            for name in filter(None, node.output):
                if name in makers or name in known:
                    raise RegraftError(f"{where}: {name!r} is made twice: rename one of them")
                makers[name] = index
        seen = outer | known | makers.keys()
        needs: dict[int, set[int]] = {}
        for index, node in enumerate(nodes):
            read = {name for name in node.input if name}
            for attribute in node.attribute:
                read |= self._attribute(node, attribute, seen, depth)
            for name in read:
                if name not in seen:
                    raise RegraftError(
                        f"{where}: nothing makes {name!r}, which {_label(node)} reads"
                    )
            needs[index] = {makers[name] for name in read if name in makers}
        if any(maker >= index for index, made in needs.items() for maker in made):
            self.unsorted = True
            _check_cycles(nodes, needs, where)
        for name in outputs:
            if name not in seen:
                raise RegraftError(f"{where}: nothing makes the output {name!r}")

    def _attribute(
        self, node: onnx.NodeProto, attribute: AttributeProto, seen: set[str], depth: int
    ) -> set[str]:
        """The names that the graphs of an attribute may read outside of themselves."""
        where = f"attribute {attribute.name!r} of {_label(node)}"
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise RegraftError(f"{where} is a sparse tensor: store it dense")
        for tensor in [*([attribute.t] if attribute.HasField("t") else ()), *attribute.tensors]:
            self._tensor(tensor, where)
        graphs = [*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs]
        for graph in graphs:
            self._graph(graph, seen, depth + 1)
        return {name for graph in graphs for name in _reads(graph) if name in seen}

    def _tensor(self, tensor: TensorProto, where: str) -> None:
        try:
            dtype = ir.DataType(tensor.data_type)
        except ValueError:
            dtype = ir.DataType.UNDEFINED
        if dtype == ir.DataType.UNDEFINED:
            raise RegraftError(f"{where} has the unknown type {tensor.data_type}")
        dims = list(tensor.dims)
        if any(dim < 0 for dim in dims):
            raise RegraftError(f"{where} has the negative size {min(dims)}")
        numbers = math.prod(dims)
        size = 0 if dtype == ir.DataType.STRING else -(-numbers * dtype.bitwidth // 8)
        if tensor.HasField("segment"):
            raise RegraftError(f"{where} is stored in segments: store it in one piece")
        if tensor.data_location == TensorProto.EXTERNAL:
            return self._external(tensor, where, dtype, size)
        if tensor.HasField("raw_data") and dtype != ir.DataType.STRING:
            found, wanted, unit = len(tensor.raw_data), size, "bytes"
        else:
            found, wanted, unit = _stored(tensor, dtype, numbers), numbers, "numbers"
        if found != wanted:
            shape = "x".join(map(str, dims)) or "scalar"
            raise RegraftError(
                f"{where} has {found} {unit} where {dtype.name} {shape} takes {wanted}: "
                "fetch or export it again"
            )

    def _external(self, tensor: TensorProto, where: str, dtype: ir.DataType, size: int) -> None:
        if self.folder is None:
            raise RegraftError(f"{where} has external data: give the model's path, not its bytes")
        if dtype == ir.DataType.STRING:
            raise RegraftError(f"{where}: strings cannot be external: store them in the file")
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if not location or "\0" in location:
            raise RegraftError(f"{where} names no file for its external data: export it again")
        folder = self.folder.resolve()
        path = (folder / location).resolve()
        if Path(location).is_absolute() or "\\" in location or not path.is_relative_to(folder):
            raise RegraftError(
                f"{where}: external data {location!r} lies outside the model's folder: "
                "move it there and export with a relative location"
            )
        if not path.is_file():
            raise RegraftError(f"{where}: external data {location!r} is missing: put it at {path}")
        try:
            offset = int(entries.get("offset") or 0)
            length = int(entries.get("length") or size)
        except ValueError:
            raise RegraftError(f"{where}: external offset or length is no number") from None
        if length != size:
            shape = "x".join(map(str, tensor.dims)) or "scalar"
            raise RegraftError(
                f"{where} has {length} bytes where {dtype.name} {shape} takes {size}: "
                "export it again"
            )
        held = path.stat().st_size
        if offset < 0 or offset + length > held:
            raise RegraftError(
                f"{where}: bytes {offset} to {offset + length} of {location!r}, which has {held}: "
                "fetch or export it again"
            )


def _stored(tensor: TensorProto, dtype: ir.DataType, numbers: int) -> int:
    """How many numbers the typed field holds."""
    field = _FIELDS.get(tensor.data_type, "int32_data")
    found = len(getattr(tensor, field))
    if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        return found // 2 if found % 2 == 0 else -1
    if field == "int32_data" and dtype.bitwidth < 8:
        each = 8 // dtype.bitwidth
        return numbers if found == -(-numbers // each) else found * each
    return found


def _unique(names: Iterable[str], where: str, what: str) -> set[str]:
    found: set[str] = set()
    for name in names:
        if not isinstance(name, str):
            raise RegraftError(
                f"{where} has the name {name!r}, which is not UTF-8: export it again"
            )
        if not name:
            raise RegraftError(f"{where}: one of the {what} has no name: export it again")
        if name in found:
            raise RegraftError(f"{where}: two {what} are named {name!r}: rename one of them")
        found.add(name)
    return found


def _check_text(node: onnx.NodeProto, where: str) -> None:
    """protobuf gives bytes for names that are not UTF-8."""
    own = [node.name, node.op_type, node.domain, node.overload, *node.input, *node.output]
    others = [text for a in node.attribute for text in (a.name, a.ref_attr_name)]
    for name in [*own, *others]:
        if not isinstance(name, str):
            raise RegraftError(
                f"{where} has the name {name!r}, which is not UTF-8: export it again"
            )


def _check_cycles(nodes: Sequence[Any], needs: dict[int, set[int]], where: str) -> None:
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        cycle = " -> ".join(_label(nodes[index]) for index in reversed(error.args[1][:6]))
        raise RegraftError(f"{where} has a cycle: {cycle}: export it again") from None


def _reads(graph: onnx.GraphProto) -> set[str]:
    """The names that a graph reads and does not make."""
    made = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
    made |= {name for node in graph.node for name in node.output}
    read = {name for node in graph.node for name in node.input if name}
    read |= {info.name for info in graph.output}
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs]:
                read |= _reads(inner)
    return read - made


def _check_calls(proto: onnx.ModelProto) -> None:
    """No function calls itself, and all of them written out are of bearable size."""
    keys = [(f.domain, f.name, f.overload) for f in proto.functions]
    functions = dict(zip(keys, proto.functions, strict=True))
    if len(functions) < len(keys):
        raise RegraftError("two functions have the same name: rename one of them")
    calls = {
        key: [(n.domain, n.op_type, n.overload) for n in all_nodes(function.node)]
        for key, function in functions.items()
    }
    order = TopologicalSorter(
        {key: {name for name in called if name in functions} for key, called in calls.items()}
    )
    try:
        ordered = list(order.static_order())
    except CycleError as error:
        raise RegraftError(
            f"function {error.args[1][0][1]!r} calls itself: use a Loop instead"
        ) from None
    sizes: dict[tuple[str, str, str], int] = {}
    for key in ordered:
        sizes[key] = sum(sizes.get(name, 1) for name in calls[key])
    total = sum(
        sizes.get((n.domain, n.op_type, n.overload), 1) for n in all_nodes(proto.graph.node)
    )
    if total > MOST_NODES:
        raise RegraftError(f"it has {total} nodes with its functions written out: simplify it")


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
    found, left = [], list(nodes)
    while left:
        node = left.pop()
        found.append(node)
        for attribute in node.attribute:
            left.extend(attribute.g.node)
            for graph in attribute.graphs:
                left.extend(graph.node)
    return found


def _label(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name!r}" if node.name else f"{node.op_type} of {_first(node)!r}"


def _first(node: onnx.NodeProto) -> str:
    return next((name for name in node.output if name), "?")


def is_map(kind: onnx.TypeProto) -> bool:
    while kind.HasField("sequence_type"):
        kind = kind.sequence_type.elem_type
    return kind.HasField("map_type")
