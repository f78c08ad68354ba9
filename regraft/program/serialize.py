"""Graphs and programs as JSON, tensors aside: no pickle, no code.

A graph is a list of nodes; an operator is named as torch names it. Only ATen, prims, mkldnn and
``regraft::`` operators and a few plain functions on sizes can be named.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx

from regraft.program.errors import RegraftError
from regraft.program.program import CacheSpec, LayerState, Program, TensorSpec, source_of, spec_of
from regraft.program.report import Report, Row

NAMESPACES = ("aten", "prims", "mkldnn", "regraft")
FORBIDDEN = ("aten.from_file", "regraft.module")
FUNCTIONS: dict[str, Callable] = {
    f"{module.__name__.lstrip('_')}.{name}": getattr(module, name)
    for module, names in (
        (operator, "getitem add sub mul floordiv truediv mod neg pow eq ne lt le gt ge and_ or_"),
        (torch, "sym_max sym_min sym_not sym_float sym_int sym_ite sym_sum"),
        (math, "ceil floor trunc sqrt"),
    )
    for name in names.split()
    if hasattr(module, name)
}
_NAMES = {function: name for name, function in FUNCTIONS.items()}
_ENUMS = {
    torch.dtype: "dtype",
    torch.layout: "layout",
    torch.memory_format: "memory_format",
}


def graph_to_json(module: fx.GraphModule) -> dict[str, Any]:
    """Nodes with operators and arguments, and the submodules they call; no tensors."""
    nodes, modules = [], {}
    for node in module.graph.nodes:
        item = {"name": node.name, "op": node.op, "target": _target_name(node)}
        item["args"], item["kwargs"] = _encode(node.args), _encode(node.kwargs)
        if spec := spec_of(node):
            item["dtype"], item["shape"] = _encode(spec[0]), list(spec[1])
        if "nn_module_stack" in node.meta or "source" in node.meta:
            item["source"] = source_of(node)
        if node.op == "call_module":
            modules[node.target] = graph_to_json(submodule(module, node.target))
        nodes.append(item)
    return {"nodes": nodes, "modules": modules}


def graph_from_json(data: dict[str, Any], tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The graph again, with its tensors by name. RegraftError on anything it cannot name."""
    try:
        return _graph_from_json(data, tensors)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise RegraftError(f"the saved graph is damaged: {type(error).__name__} {error}") from error


def _graph_from_json(data: dict[str, Any], tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    root = torch.nn.Module()
    for name, inner in data["modules"].items():
        root.add_module(name, _graph_from_json(inner, {}))
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for item in data["nodes"]:
        target: Any = item["target"]
        if item["op"] == "call_function":
            target = _function(target)
        elif item["op"] == "get_attr":
            value = tensors[target]
            if isinstance(value, torch.nn.Parameter):
                root.register_parameter(target, value)
            else:
                root.register_buffer(target, value)
        args, kwargs = _decode(item["args"], made), _decode(item["kwargs"], made)
        node = graph.create_node(item["op"], target, args, kwargs, item["name"])
        if "shape" in item:
            dims = tuple(item["shape"])
            node.meta["spec"] = (_decode(item["dtype"], made), dims)
        if "source" in item:
            node.meta["source"] = item["source"]
        made[item["name"]] = node
    graph.lint()
    return fx.GraphModule(root, graph)


def program_to_json(program: Program) -> dict[str, Any]:
    return {
        "graph": graph_to_json(program.graph_module),
        "inputs": [_spec_to_json(spec) for spec in program.inputs],
        "outputs": [_spec_to_json(spec) for spec in program.outputs],
        "cache": [layer_to_json(layer) for layer in program.cache.layers],
        "states": [_spec_to_json(spec) for spec in program.cache.states],
        "rollback": program.cache.rollback,
        "kernels": program.cache.kernels,
        "tokens": list(program.tokens),
        "context": program.context,
        "prefill": program.prefill and program_to_json(program.prefill),
    }


def program_from_json(data: dict[str, Any], tensors: Mapping[str, Tensor]) -> Program:
    """The program, without the sample inputs that its passes were checked with."""
    graph = graph_from_json(data["graph"], tensors)
    layers = tuple(layer_from_json(i, layer, tensors) for i, layer in enumerate(data["cache"]))
    specs = [tuple(map(_spec_from_json, data[side])) for side in ("inputs", "outputs")]
    states = tuple(map(_spec_from_json, data["states"]))
    program = Program(
        graph, specs[0], specs[1],
        CacheSpec(layers, states, data["rollback"], data["kernels"]),
        tokens=tuple(data["tokens"]), context=data["context"],
    )  # fmt: skip
    if data["prefill"]:
        own = {
            n.removeprefix("prefill."): t for n, t in tensors.items() if n.startswith("prefill.")
        }
        program.prefill = program_from_json(data["prefill"], own)
    program.verify()
    return program


def report_to_json(report: Report) -> list[dict[str, Any]]:
    return [{**asdict(row), "skipped": list(map(list, row.skipped))} for row in report.rows]


def report_from_json(data: list[dict[str, Any]]) -> Report:
    return Report([Row(**{**row, "skipped": tuple(map(tuple, row["skipped"]))}) for row in data])


def submodule(module: fx.GraphModule, name: Any) -> fx.GraphModule:
    """The graph that a ``call_module`` node calls."""
    found = module.get_submodule(str(name))
    assert isinstance(found, fx.GraphModule)
    return found


def tensors_of(module: fx.GraphModule) -> dict[str, Tensor]:
    """The parameters and constants that the graph reads, by the names it reads them under."""
    nodes = module.graph.find_nodes(op="get_attr")
    return {str(node.target): getattr(module, str(node.target)) for node in nodes}


def program_tensors(program: Program) -> dict[str, Tensor]:
    """What the program's graph reads, and ``cache.{layer}.{name}`` of its layers' states; those of
    its prefill begin with "prefill."."""
    return {
        prefix + name: tensor
        for prefix, part in program.parts.items()
        for name, tensor in (tensors_of(part.graph_module) | cache_tensors(part.cache)).items()
    }


def cache_tensors(cache: CacheSpec) -> dict[str, Tensor]:
    """The tensors of the layers' states, as ``cache.{layer}.{name}``."""
    return {
        f"cache.{index}.{name}": tensor
        for index, layer in enumerate(cache.layers)
        for name, tensor in layer.tensors.items()
    }


def layer_to_json(layer: LayerState) -> dict[str, Any]:
    settings = _encode(layer.settings)
    return {"format": layer.format, "settings": settings, "tensors": sorted(layer.tensors)}


def layer_from_json(index: int, data: dict[str, Any], tensors: Mapping[str, Tensor]) -> LayerState:
    """The state of this layer, its tensors as ``cache_tensors`` names them."""
    found = {name: tensors[f"cache.{index}.{name}"] for name in data["tensors"]}
    return LayerState(data["format"], _decode(data["settings"], {}), found)


def _spec_to_json(spec: TensorSpec) -> dict[str, Any]:
    return {**asdict(spec), "shape": list(spec.shape), "dtype": _encode(spec.dtype)}


def _spec_from_json(data: dict[str, Any]) -> TensorSpec:
    return TensorSpec(
        **{**data, "shape": tuple(data["shape"]), "dtype": _decode(data["dtype"], {})}
    )


def _target_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if node.target is torch.ops.regraft.module.default:
        raise RegraftError(
            f"{source_of(node)} stays Python, since its control flow depends on data: such a "
            "program cannot be saved"
        )
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    if node.target not in _NAMES:
        raise RegraftError(f"{node.name} calls {node.target}, which cannot be saved")
    return _NAMES[node.target]


def _function(name: str) -> Callable:
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, operation, overload = name.split(".")
    if namespace not in NAMESPACES or f"{namespace}.{operation}" in FORBIDDEN:
        raise RegraftError(f"the saved graph calls {name}, which is not allowed")
    return getattr(getattr(getattr(torch.ops, namespace), operation), overload)


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _encode(item) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encode(item) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if type(value) in _ENUMS:
        return {_ENUMS[type(value)]: str(value).removeprefix("torch.")}
    if value is Ellipsis:
        return {"ellipsis": True}
    raise RegraftError(f"an argument of type {type(value).__name__} cannot be saved")


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(_decode(item, nodes) for item in content)
    if kind == "dict":
        return {key: _decode(item, nodes) for key, item in content.items()}
    if kind == "slice":
        return slice(*(_decode(item, nodes) for item in content))
    if kind == "device":
        return torch.device(content)
    if kind == "float":
        return float(content)
    if kind == "ellipsis":
        return Ellipsis
    if kind in _ENUMS.values():
        found = getattr(torch, content)
        if _ENUMS.get(type(found)) == kind:
            return found
    raise ValueError(f"unknown value {value}")
