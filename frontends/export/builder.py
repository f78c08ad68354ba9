"""Appends ONNX nodes to a graph or to the body of a function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from regraft.program import CacheSpec

DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.uint16: ir.DataType.UINT16,
    torch.bool: ir.DataType.BOOL,
}
TORCH = {onnx: dtype for dtype, onnx in DTYPES.items()}
FLOAT, INT = torch.float32, torch.int64
DOMAIN = "ai.regraft"
Number = int | float | bool


@dataclass(frozen=True)
class Size:
    """A dynamic size: an int64 tensor [1]."""

    value: ir.Value


@dataclass(frozen=True)
class State:
    """What a step leaves for the next one, and its shape and type as an input of that."""

    value: ir.Value
    shape: tuple[int | str, ...]
    dtype: torch.dtype


Handler = Callable[..., Any]
handlers: dict[str, Handler] = {}
"""How an operator becomes ONNX nodes, by its name without overload."""


def lowers(*names: str) -> Callable[[Handler], Handler]:
    """Register handler(builder, *args, **kwargs) for operators such as "aten.add".

    Tensors are ir.Values, dynamic sizes Sizes, everything else plain Python.
    """

    def register(handler: Handler) -> Handler:
        handlers.update(dict.fromkeys(names, handler))
        return handler

    return register


class Builder:
    """Nodes in order. ``dtype`` is that of the operator's result that is being built, ``scope``
    the module path that its nodes are named by. local: operators become functions; contrib: those
    of onnxruntime may be used, ``fused`` counts them. ``given``: the inputs of the graph that is
    being built, ``presents``: states that it leaves beside its outputs, both by name; is_body:
    whether that is the graph of an If, a Loop or a Scan."""

    def __init__(self, opset: int, local: bool = False, contrib: bool = False) -> None:
        self.opset, self.local, self.contrib = opset, local, contrib
        self.fused: dict[str, int] = {}
        self.nodes: list[ir.Node] = []
        self.functions: dict[str, ir.Function] = {}
        self.dtype = torch.float32
        self.scope = ""
        self._constants: dict[Any, ir.Value] = {}
        self._names: dict[str, int] = {}
        self._transposed: dict[ir.Value, ir.Value] = {}
        self._made: dict[Any, tuple[str, list[Any]]] = {}
        self.cache = CacheSpec()
        self.weights = Weights({})
        self.given: dict[str, ir.Value] = {}
        self.presents: dict[str, State] = {}
        self.tables: dict[ir.Value, tuple[ir.Value, ...]] = {}
        self.padding: dict[int, ir.Value] = {}
        self.is_body = False

    def op(
        self,
        name: str,
        *inputs: ir.Value | None,
        dtype: torch.dtype | None = None,
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """A node's output, or list of outputs; their dtype is that of the first input by default.

        An attribute may be an ir.Attr; those that are None are left out.
        """
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        given = {key: value for key, value in attributes.items() if value is not None}
        node = ir.Node(
            domain,
            name,
            inputs,
            ir.convenience.convert_attributes(given),
            num_outputs=outputs,
            name=self.unique(f"{self.scope}/{name}"),
        )
        self.nodes.append(node)
        first = inputs[1:] if name in ("Where", "CastLike") else inputs
        kind = DTYPES[dtype] if dtype else next((x.dtype for x in first if x is not None), None)
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}_output_{index}"
            value.type = ir.TensorType(kind) if kind is not None else None
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return f"{name}_{count}" if count else name

    def constant(self, value: Any, dtype: torch.dtype | None = None) -> ir.Value:
        """A number, a nested list or a tensor as a Constant node, each once."""
        tensor = torch.as_tensor(value, dtype=dtype)
        key = tensor.dtype, tuple(tensor.shape), str(tensor.tolist())
        if key not in self._constants:
            made = self.op("Constant", dtype=tensor.dtype, value=to_ir(tensor.contiguous()))
            made.shape = ir.Shape(tensor.shape)
            self._constants[key] = made
        return self._constants[key]

    def to(self, x: Any, dtype: torch.dtype | None = None) -> ir.Value:
        """x, a tensor, number or size, of this dtype, by default the result's."""
        dtype = dtype or self.dtype
        if isinstance(x, Size):
            x = self.op("Squeeze", x.value, self.constant([0]))
        if not isinstance(x, ir.Value):
            return self.constant(x, dtype)
        return x if x.dtype == DTYPES[dtype] else self.cast(x, dtype)

    def cast(self, x: ir.Value, dtype: torch.dtype) -> ir.Value:
        made = self.op("Cast", x, dtype=dtype, to=int(DTYPES[dtype]))
        made.shape = x.shape
        return made

    def numbers(self, items: Sequence[Any]) -> ir.Value:
        """Ints and sizes as one int64 tensor."""
        if not any(isinstance(item, (Size, ir.Value)) for item in items):
            return self.constant(list(items), INT)
        parts = [self.vector(item) for item in items]
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def vector(self, item: Any) -> ir.Value:
        """An int or a size as an int64 tensor [1]."""
        if isinstance(item, Size):
            return item.value
        if isinstance(item, ir.Value):
            return self.op("Reshape", self.to(item, INT), self.constant([1]))
        return self.constant([item], INT)

    def size(self, x: ir.Value, dim: int) -> ir.Value:
        """x's size along dim, as an int64 tensor [1]."""
        return self.op("Shape", x, dtype=INT, start=dim, end=dim + 1 or None)

    def reshape(self, x: ir.Value, sizes: Sequence[Any]) -> ir.Value:
        made = self.op("Reshape", x, self.numbers(sizes))
        made.shape = ir.Shape([n if isinstance(n, int) and n > 0 else None for n in sizes])
        return made

    def transpose(self, x: ir.Value, *order: int) -> ir.Value:
        made = self.op("Transpose", x, perm=list(order))
        made.shape = None if x.shape is None else ir.Shape([x.shape[d] for d in order])
        return made

    def slice(self, x: ir.Value, start: Any, stop: Any, axis: int, step: int = 1) -> ir.Value:
        ends = (self.vector(item) for item in (start, stop))
        return self.op("Slice", x, *ends, self.constant([axis]), self.constant([step]))

    def unsqueeze(self, x: ir.Value, *axes: int) -> ir.Value:
        return self.op("Unsqueeze", x, self.constant(list(axes)))

    def squeeze(self, x: ir.Value, *axes: int) -> ir.Value:
        return self.op("Squeeze", x, self.constant(list(axes)))

    def transposed(self, weight: ir.Value) -> ir.Value:
        """A matrix the other way round, one node a matrix."""
        if weight not in self._transposed:
            self._transposed[weight] = self.transpose(weight, 1, 0)
        return self._transposed[weight]

    def call(
        self,
        name: str,
        body: Callable[..., Any],
        *inputs: ir.Value | None,
        outputs: int = 1,
        **settings: Any,
    ) -> Any:
        """Call body(builder, *inputs, **settings) as a function of domain ai.regraft, or where
        functions are not wanted build it here. Equal settings and shapes share a function, whose
        attributes tell what the settings were."""
        if not self.local:
            return body(self, *inputs, **settings)
        kinds = tuple(x and (x.dtype, tuple(x.shape or ())) for x in inputs)
        key = name, str(kinds), str(settings)
        if key not in self._made:
            given = [
                ir.Value(name=f"x{i}") if x is None
                else ir.Value(name=f"x{i}", shape=x.shape, type=x.type)
                for i, x in enumerate(inputs)
            ]  # fmt: skip
            inner = Builder(self.opset)
            inner.dtype = self.dtype
            used = (v if x is not None else None for v, x in zip(given, inputs, strict=True))
            results = body(inner, *used, **settings)
            results = [results] if outputs == 1 else list(results)
            unique = self.unique(name)
            graph = ir.Graph(given, results, nodes=inner.nodes, opset_imports={"": self.opset})
            numbers = {k: v for k, v in settings.items() if isinstance(v, (bool, int, float))}
            attributes = ir.convenience.convert_attributes(
                {k: int(v) if isinstance(v, bool) else v for k, v in numbers.items()}
            )
            self.functions[unique] = ir.Function(DOMAIN, unique, graph=graph, attributes=attributes)
            self._made[key] = unique, [(x.dtype, x.shape) for x in results]
        unique, results = self._made[key]
        made = self.op(unique, *inputs, domain=DOMAIN, outputs=outputs)
        for value, (dtype, shape) in zip([made] if outputs == 1 else made, results, strict=True):
            value.type, value.shape = ir.TensorType(dtype), shape
        return made

    def either(
        self,
        condition: ir.Value,
        then: Callable[[Builder], list[ir.Value]],
        otherwise: Callable[[Builder], list[ir.Value]],
    ) -> list[ir.Value]:
        """The results of then(builder) or otherwise(builder), whose nodes may read those here."""
        graphs: dict[str, Any] = {}
        for name, body in (("then_branch", then), ("else_branch", otherwise)):
            graphs[name] = self._graph([], body)
        kinds = [x.type for x in graphs["then_branch"].outputs]
        return _typed(self.op("If", condition, outputs=len(kinds), **graphs), kinds)

    def scan(
        self, body: Callable[..., list[ir.Value]], states: list[ir.Value], items: list[ir.Value]
    ) -> list[ir.Value]:
        """body(builder, *states, *slices of items along their first dimension) gives new states
        and results: the last states and all results."""
        given = [
            ir.Value(name=self.unique("scanned"), type=x.type)
            for x in (*states, *items)
        ]  # fmt: skip
        graph = self._graph(given, lambda inner: body(inner, *given))
        kinds = [x.type for x in graph.outputs]
        made = self.op(
            "Scan", *states, *items, outputs=len(kinds), body=graph, num_scan_inputs=len(items)
        )
        return _typed(made, kinds)

    def loop(
        self, turns: ir.Value, body: Callable[..., list[ir.Value]], states: list[ir.Value]
    ) -> list[ir.Value]:
        """body(builder, turn [1], *states) gives new states and results, as often as turns [1]
        says: the last states, and the results of all turns along a new first dimension."""
        turn = ir.Value(name=self.unique("turn"), shape=ir.Shape([]), type=_type(INT))
        going = ir.Value(name=self.unique("going"), shape=ir.Shape([]), type=_type(torch.bool))
        given = [_formal(self.unique("carried"), x) for x in states]

        def whole(inner: Builder) -> list[ir.Value]:
            return [going, *body(inner, inner.unsqueeze(turn, 0), *given)]

        graph = self._graph([turn, going, *given], whole)
        _, *made = graph.outputs
        kinds = [x.type for x in made]
        limit, start = self.squeeze(turns, 0), self.constant(True)
        results = self.op("Loop", limit, start, *states, outputs=len(kinds), body=graph)
        return _typed(results, kinds)

    def _graph(self, inputs: list[ir.Value], body: Callable[[Builder], list[ir.Value]]) -> ir.Graph:
        inner = self.inside()
        name = inner.scope = self.unique(f"{self.scope}/body")
        results = [inner.op("Identity", x) for x in body(inner)]
        return ir.Graph(inputs, results, nodes=inner.nodes, name=name)

    def inside(self) -> Builder:
        """A builder of a body, which may read what stands here."""
        inner = copy.copy(self)
        inner.nodes, inner.given, inner.presents, inner.is_body = [], {}, {}, True
        inner._constants, inner._transposed, inner.tables, inner.padding = {}, {}, {}, {}
        return inner

    def range(self, stop: ir.Value) -> ir.Value:
        """0 .. stop - 1, int64; stop [1]."""
        zero, one = self.constant(0), self.constant(1)
        return self.op("Range", zero, self.squeeze(stop, 0), one)


def _type(dtype: torch.dtype) -> ir.TensorType:
    return ir.TensorType(DTYPES[dtype])


def _typed(values: Any, kinds: list[Any]) -> list[ir.Value]:
    """The results of a node with bodies, as a list, of these types."""
    made = [values] if len(kinds) == 1 else values
    for value, kind in zip(made, kinds, strict=True):
        value.type = kind
    return made


def _formal(name: str, like: ir.Value) -> ir.Value:
    """An input of a body: of the type of what it starts as, of any dynamic size."""
    sizes = None if like.shape is None else [n if isinstance(n, int) else None for n in like.shape]
    return ir.Value(name=name, shape=None if sizes is None else ir.Shape(sizes), type=like.type)


class Weights:
    """Initialisers by the tensors that they hold, each tensor once."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names
        self.values: dict[int, ir.Value] = {}
        self._taken: set[str] = set()
        self._made: dict[str, ir.Value] = {}
        self._kept: list[torch.Tensor] = []
        self.parts: dict[tuple[int, int], dict[str, ir.Value]] = {}
        """What packed weights became, by where they lie and how many rows they are."""

    def value(self, target: str, tensor: torch.Tensor) -> ir.Value:
        if id(tensor) not in self.values:
            name = self.names.get(target, target)
            while name in self._taken:
                name += "_"
            self._taken.add(name)
            self._kept.append(tensor)
            held = to_ir(tensor.detach().cpu().contiguous(), name)
            kind = ir.TensorType(DTYPES[tensor.dtype])
            self.values[id(tensor)] = ir.Value(
                name=name, shape=ir.Shape(tensor.shape), type=kind, const_value=held
            )
        return self.values[id(tensor)]

    def lazy(
        self, name: str, shape: tuple[int, ...], dtype: ir.DataType, make: Callable[[], Any]
    ) -> ir.Value:
        """A tensor whose array is made when it is written."""
        sizes = ir.Shape(shape)
        held = ir.LazyTensor(lambda: ir.Tensor(make(), name=name), dtype, sizes, name=name)
        made = ir.Value(name=name, shape=sizes, type=ir.TensorType(dtype), const_value=held)
        self.values[id(held)] = made
        return made

    def made(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """A tensor made for this name: the first of those that are made for it."""
        if name not in self._made:
            self._made[name] = self.value(name, tensor)
        return self._made[name]


def rank(x: ir.Value) -> int:
    assert x.shape is not None
    return len(x.shape)


def to_ir(tensor: torch.Tensor, name: str | None = None) -> ir.TensorProtocol:
    """The tensor for ONNX, sharing its memory."""
    if tensor.dtype == torch.bfloat16:
        array = tensor.view(torch.uint16).numpy()
        return ir.Tensor(array.view(ir.DataType.BFLOAT16.numpy()), name=name)
    return ir.Tensor(tensor.numpy(), name=name)
