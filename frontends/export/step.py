"""One step of a program, an fx graph, as ONNX nodes."""

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
from regraft.frontends.export.builder import DTYPES, Builder, handlers
from regraft.program import Program, RegraftError
from regraft.program.program import source_of, spec_of
from regraft.program.serialize import submodule

REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
IGNORED = ("aten._assert_tensor_metadata", "aten._assert_async", "aten._assert_scalar")


def step(b: Builder, program: Program, given: dict[str, ir.Value]) -> list[ir.Value]:
    """The program's outputs for inputs by name. What its layers keep beside them is read from
    given, where it lacks put there, and left in ``b.presents``.

    RegraftError names the first operator that ONNX has no form of here.
    """
    b.given, b.presents = given, {}
    placeholders = program.graph.find_nodes(op="placeholder")
    env: dict[fx.Node, Any] = {
        node: given[spec.name] for node, spec in zip(placeholders, program.inputs, strict=True)
    }
    return list(_run(program.graph_module, env, b))


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
