"""An fx graph to an ONNX graph."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx
from torch.utils import _pytree as pytree

from regraft.frontends.export import aten, operators  # noqa: F401  register the handlers
from regraft.frontends.export.aten.complex import Complex, of_parts
from regraft.frontends.export.builder import DOMAIN, DTYPES, Builder, Weights, handlers
from regraft.program import Program, RegraftError, TensorSpec
from regraft.program.program import source_of, spec_of
from regraft.program.serialize import submodule

IR_VERSION = 10
REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
IGNORED = ("aten._assert_tensor_metadata", "aten._assert_async", "aten._assert_scalar")


def convert(program: Program, builder: Builder, producer_version: str) -> ir.Model:
    """The program as a model whose weights share the program's memory.

    RegraftError names the first operator that ONNX has no form of here.
    """
    builder.cache = program.cache
    builder.weights = weights = Weights(program.metadata.get("parameters", {}))
    placeholders = program.graph.find_nodes(op="placeholder")
    inputs = [_input(spec) for spec in program.inputs]
    builder.given = {str(value.name): value for value in inputs}
    env: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
    results = _run(program.graph_module, env, builder)
    outputs = []
    for spec, result in zip(program.outputs, results, strict=True):
        value = builder.op("Identity", result)
        value.name, value.shape = spec.name, _shape(spec)
        outputs.append(value)
    graph = ir.Graph(
        [*inputs, *builder.inputs],
        [*outputs, *builder.outputs],
        nodes=builder.nodes,
        initializers=list(weights.values.values()),
        opset_imports={"": builder.opset}
        | ({DOMAIN: 1} if builder.functions else {})
        | ({"com.microsoft": 1} if builder.fused else {}),
        name="regraft",
    )
    keep_transposed(graph)
    return ir.Model(
        graph,
        ir_version=IR_VERSION,
        producer_name="regraft",
        producer_version=producer_version,
        functions=list(builder.functions.values()),
    )


def _input(spec: TensorSpec) -> ir.Value:
    return ir.Value(name=spec.name, shape=_shape(spec), type=ir.TensorType(DTYPES[spec.dtype]))


def _shape(spec: TensorSpec) -> ir.Shape:
    return ir.Shape(spec.shape)


def _run(module: fx.GraphModule, env: dict[fx.Node, Any], b: Builder) -> Any:
    """Build the nodes of a graph whose placeholders env holds; its outputs."""
    for node in module.graph.nodes:
        if node.op == "get_attr":
            held = module
            *path, last = str(node.target).split(".")
            for part in path:
                held = getattr(held, part)
            tensor = getattr(held, last)
            if torch.is_tensor(tensor):
                env[node] = b.weights.value(str(node.target), tensor)
        elif node.op == "call_module":
            inner = submodule(module, str(node.target))
            given = [_value(b, a, env) for a in node.args]
            places = inner.graph.find_nodes(op="placeholder")
            env[node] = _run(inner, dict(zip(places, given, strict=True)), b)
        elif node.op == "call_function":
            env[node] = _node(node, env, b)
        elif node.op == "output":
            return _value(b, node.args[0], env)
    raise RegraftError("the graph has no output")


def _node(node: fx.Node, env: dict[fx.Node, Any], b: Builder) -> Any:
    name = name_of(node.target)
    if name in IGNORED:
        return None
    handler = handlers.get(name.removesuffix("_") if _changes(name) else name)
    if handler is None and f"complex.{name.removeprefix('aten.')}" not in handlers:
        raise RegraftError(f"{source_of(node)}: {name} has no ONNX form here")
    spec = spec_of(node)
    b.scope = "/" + source_of(node).split(" (")[0].removeprefix("(").replace(".", "/")
    b.dtype = REAL.get(spec[0], spec[0]) if spec else torch.float32
    args = [_value(b, a, env) for a in node.args]
    kwargs = {key: _value(b, value, env) for key, value in node.kwargs.items()}
    try:
        if any(isinstance(a, Complex) for a in pytree.tree_leaves(args)):
            result = of_parts(b, name, args, kwargs)
        else:
            result = handler(b, *args, **kwargs)
        if _changes(name):
            _write_back(node.args[0], result, env, b)
    except (NotImplementedError, TypeError, KeyError, AssertionError) as error:
        raise RegraftError(
            f"{source_of(node)}: {name} cannot be exported: {error or type(error).__name__}"
        ) from error
    if isinstance(result, ir.Value):
        if spec is not None:
            _describe(result, *spec)
    elif isinstance(result, Complex):
        for part in (result.real, result.imag):
            _describe(part, REAL[spec[0]], spec[1])  # type: ignore[index]
    elif isinstance(result, list):
        for value, meta in zip(result, _parts(node), strict=False):
            if isinstance(value, ir.Value) and torch.is_tensor(meta):
                _describe(value, meta.dtype, tuple(_dim(n) for n in meta.shape))
    return result


def _changes(name: str) -> bool:
    return name.startswith("aten.") and name.endswith("_") and not name.endswith("__")


def _write_back(node: Any, result: ir.Value, env: dict[fx.Node, Any], b: Builder) -> None:
    """Let a tensor that was changed in place, and what it is a part of, be the result."""
    env[node] = result
    name = name_of(node.target)
    if name in ("aten.slice", "aten.select"):
        base, *place = node.args
        given = [_value(b, item, env) for item in place]
        whole = handlers[f"{name}_scatter"](b, env[base], result, *given)
        _describe(whole, *spec_of(base))  # type: ignore[misc]
        _write_back(base, whole, env, b)
    elif not _alone(node):
        raise NotImplementedError(f"it changes a tensor through {name}")


def _alone(node: Any) -> bool:
    """Whether nothing else reads the memory of a node: it is no view, or the only one. Parts of a
    split lie apart."""
    if node.target is operator.getitem:
        return _alone(node.args[0])
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.op == "call_function"
    if schema.is_mutable or all(r.alias_info is None for r in schema.returns):
        return True
    return len(node.args[0].users) == 1 and _alone(node.args[0])


def name_of(target: Any) -> str:
    """ "aten.add" of aten.add.Tensor, "add" of operator.add."""
    packet = getattr(target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(target, "__name__", str(target))


def _parts(node: fx.Node) -> Sequence[Any]:
    """The results of a node of several, from its own or from its users' records."""
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        return value
    parts: dict[int, Any] = {u.args[1]: u.meta.get("val") for u in node.users if len(u.args) > 1}  # type: ignore
    return [parts.get(i) for i in range(max(parts, default=-1) + 1)]


def _dim(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


def _describe(value: ir.Value, dtype: torch.dtype, shape: tuple[int | str, ...]) -> None:
    value.type = ir.TensorType(DTYPES[dtype])
    value.shape = ir.Shape([n if isinstance(n, int) else None for n in shape])


def _value(b: Builder, argument: Any, env: dict[fx.Node, Any]) -> Any:
    """An argument with the values of its nodes."""
    if isinstance(argument, fx.Node):
        return env[argument]
    if isinstance(argument, (list, tuple)):
        return [_value(b, item, env) for item in argument]
    return argument


def keep_transposed(graph: ir.Graph) -> None:
    """Store weights that are only used transposed the other way round, without the Transpose."""
    for weight in list(graph.initializers.values()):
        users = [use.node for use in weight.uses()]
        if not users or any(n.op_type != "Transpose" for n in users):
            continue
        turned = _turned(weight)
        weight.const_value, weight.shape = turned, turned.shape
        for node in users:
            ir.convenience.replace_all_uses_with(node.outputs[0], weight)
            graph.remove(node, safe=True)


def _turned(weight: ir.Value) -> ir.LazyTensor:
    """The matrix the other way round, made when it is written."""
    tensor, name = weight.const_value, weight.name
    assert tensor is not None

    def make() -> ir.Tensor:
        return ir.Tensor(tensor.numpy().T.copy(), name=name)

    rows, columns = (int(n) for n in tensor.shape)  # type: ignore[arg-type]
    return ir.LazyTensor(make, dtype=tensor.dtype, shape=ir.Shape([columns, rows]), name=name)
