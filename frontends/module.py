"""torch modules and exported programs to a Program, through torch.export."""

from __future__ import annotations

import inspect
import io
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from operator import getitem
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from regraft.kernels import ops  # noqa: F401  registers the regraft:: operators
from regraft.program import InputError, Program, RegraftError, TensorSpec

TORCH = str(Path(torch.__file__).parent)
COEXEC = str(Path(__file__).resolve().parents[1] / "runtime" / "coexec")
WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
higher = torch.ops.higher_order


def capture_module(
    module: nn.Module,
    example_inputs: Any,
    dynamic_shapes: Any = None,
    names: Any = None,
    wraps: nn.Module | None = None,
) -> Program:
    """Program of one call of the module in evaluation mode.

    example_inputs: a tuple of positional inputs or a dict of keyword inputs; dynamic_shapes as
    torch.export takes them. Inputs carry the names of forward's arguments; inputs that are no
    tensors are constants. names (default: dynamic_shapes) holds the names of dynamic sizes. The
    weights are the module's own tensors, under its own names with underscores for dots. wraps:
    the model that the module holds as ``model``; names and errors are then the model's.
    """
    args, kwargs = arguments(example_inputs)
    shown = wraps or module
    was_training = {m: m.training for m in module.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        module.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), _silence():
            exported = torch.export.export(
                module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:
        raise _explained(shown, error) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part, training in was_training.items():
            part.training = training
    given = dynamic_shapes if names is None else names
    program = from_exported(exported, given, strip="model." if wraps else "")
    program.metadata["forward"] = list(inspect.signature(module.forward).parameters)
    return program


def from_exported(
    exported: torch.export.ExportedProgram, names: Any = None, strip: str = ""
) -> Program:
    """Program of an exported program.

    names, of the structure of dynamic_shapes, holds a Dim or a string for each dynamic size.
    """
    signature = exported.graph_signature
    _refuse_changes(exported)
    call = exported.module_call_graph[0].signature
    arguments, paths = _paths(call.in_spec, call.forward_arg_names)
    graph, attributes, env = fx.Graph(), {}, {}
    parameters: dict[str, str] = {}
    placeholders = exported.graph.find_nodes(op="placeholder")
    users = [
        (node, spec)
        for node, spec in zip(placeholders, signature.input_specs, strict=True)
        if spec.kind not in WEIGHTS
    ]
    constants: dict[int, Any] = {}
    for index, (node, spec) in enumerate(users):
        if spec.kind is not InputKind.USER_INPUT:
            raise RegraftError(f"input {node.name} is a {spec.kind.name.lower()}: not supported")
        if torch.is_tensor(node.meta.get("val")):
            env[node] = graph.placeholder(paths[index].replace(".", "_"))
            env[node].meta = dict(node.meta)
        else:
            constants[index] = env[node] = spec.arg.value
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind in WEIGHTS:
            name = _attribute(spec.target.removeprefix(strip), attributes)
            parameters[name] = spec.target.removeprefix(strip)
            attributes[name] = (
                exported.state_dict[spec.target]
                if spec.target in exported.state_dict
                else exported.constants[spec.target]
            )
            env[node] = graph.get_attr(name)
            env[node].meta = dict(node.meta)
    results = _inline(exported.graph_module, graph, attributes, env)
    tensors = [r for r in results if isinstance(r, fx.Node)]
    graph.output(tuple(tensors))
    graph.eliminate_dead_code()
    sizes = _Sizes(paths, call.in_spec, names)
    given = [(i, node) for i, (node, _) in enumerate(users) if i not in constants]
    inputs = [sizes.spec(paths[i], node.meta["val"], i) for i, node in given]
    outputs = []
    for path, result in zip(_leaves(call.out_spec, "output"), results, strict=True):
        if isinstance(result, fx.Node):
            if not torch.is_tensor(result.meta.get("val")):
                raise RegraftError(f"{path} is a number that depends on the input: return a tensor")
            outputs.append(sizes.spec(path, result.meta["val"], None))
    examples = _examples(exported.example_inputs, constants)
    metadata = {
        "arguments": arguments,
        "forward": arguments,
        "constants": constants,
        "in_spec": call.in_spec,
        "out_spec": call.out_spec,
        "parameters": parameters,
        "results": [None if isinstance(r, fx.Node) else (r,) for r in results],
        "ranges": sizes.ranges(exported.range_constraints),
        "device": str(next((n.meta["val"].device for _, n in given), torch.device("cpu"))),
    }
    module = fx.GraphModule(attributes, graph)
    return Program(module, tuple(inputs), tuple(outputs), examples=examples, metadata=metadata)


def _refuse_changes(exported: torch.export.ExportedProgram) -> None:
    """Raise when the module writes to its own buffers or to its inputs."""
    signature = exported.graph_signature
    for out in signature.output_specs:
        if out.kind is not OutputKind.USER_OUTPUT:
            raise RegraftError(_changes(out.target))
    targets = {spec.arg.name: spec.target or spec.arg.name for spec in signature.input_specs}
    for node in exported.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        for argument, value in zip(schema.arguments, node.args, strict=False):
            if argument.is_write and isinstance(value, fx.Node):
                root = _owner(value)
                if root.op == "placeholder":
                    raise RegraftError(_changes(targets[root.name]))


def _changes(target: str | None) -> str:
    return f"the module changes {target!r} while it runs: return the new value as an output instead"


def _owner(node: fx.Node) -> fx.Node:
    """The node whose memory this one views."""
    while (schema := getattr(node.target, "_schema", None)) is not None:
        if all(result.alias_info is None for result in schema.returns):
            break
        (node, *_) = node.args  # type: ignore[assignment]
    return node


def arguments(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword inputs of an example."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if torch.is_tensor(example_inputs):
        return (example_inputs,), {}
    raise InputError(
        f"example_inputs is a {type(example_inputs).__name__}: give a tuple of positional inputs "
        "or a dict of keyword inputs"
    )


def _examples(example_inputs: Any, constants: dict[int, Any]) -> tuple[torch.Tensor, ...]:
    if example_inputs is None:
        return ()
    flat = pytree.tree_leaves(example_inputs)
    return tuple(value for i, value in enumerate(flat) if i not in constants)


def _paths(in_spec: pytree.TreeSpec, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the arguments that were given, and a name for each leaf of the inputs."""
    args, kwargs = in_spec.children()
    count = args.num_children
    names = [*(arguments or [f"input_{i}" for i in range(count)])[:count], *kwargs.context]
    paths: list[str] = []
    for name, child in zip(names, [*args.children(), *kwargs.children()], strict=True):
        paths += _leaves(child, name)
    return names, paths


def _leaves(spec: pytree.TreeSpec, name: str) -> list[str]:
    if spec.is_leaf():
        return [name]
    keys = spec.context if isinstance(spec.context, list) else range(spec.num_children)
    if len(keys) != spec.num_children:
        keys = range(spec.num_children)
    parts = zip(keys, spec.children(), strict=True)
    return [path for key, child in parts for path in _leaves(child, f"{name}.{key}")]


def _attribute(target: str, taken: dict[str, Any]) -> str:
    name = target.replace(".", "_")
    while name in taken:
        name += "_"
    return name


def _inline(source: fx.GraphModule, graph: fx.Graph, attributes: dict, env: dict) -> list[Any]:
    """Copy the nodes of source into graph; regions that only switch gradients are opened."""
    for node in source.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return [fx.map_arg(value, env.__getitem__) for value in node.args[0]]
        if node.op == "get_attr":
            value = getattr(source, node.target)
            if isinstance(value, fx.GraphModule) and all(map(_is_switch, node.users)):
                continue
            name = _attribute(node.target, attributes)
            attributes[name] = value
            env[node] = graph.get_attr(name)
        elif _is_switch(node):
            start = 1 if node.target is higher.wrap_with_set_grad_enabled else 4
            region = getattr(source, node.args[start].target)
            inner = region.graph.find_nodes(op="placeholder")
            given = fx.map_arg(node.args[start + 1 :], env.__getitem__)
            env[node] = _inline(region, graph, attributes, dict(zip(inner, given, strict=True)))
            continue
        elif node.target is getitem and isinstance(env[node.args[0]], list):
            env[node] = env[node.args[0]][node.args[1]]
            continue
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = dict(node.meta)
    raise RegraftError("the exported graph has no output")


def _is_switch(node: fx.Node) -> bool:
    return node.target is higher.wrap_with_set_grad_enabled or (
        node.target is higher.wrap_with_autocast and node.args[2] is False
    )


class _Sizes:
    """Names of the dynamic sizes: those that were given, else of the input they come from."""

    def __init__(self, paths: list[str], in_spec: pytree.TreeSpec, names: Any) -> None:
        self.names: dict[sympy.Symbol, str] = {}
        dims: list[Any] = []
        if isinstance(names, (Mapping, Sequence)):
            args, kwargs = in_spec.children()
            children = [*args.children(), *kwargs.children()]
            given = list(names.values()) if isinstance(names, Mapping) else names
            for child, name in zip(children, given, strict=False):
                dims += _dims(child, name)
        self.dims = dims if len(dims) == len(paths) else [{}] * len(paths)

    def spec(self, name: str, value: torch.Tensor, index: int | None) -> TensorSpec:
        role = "output" if index is None else "input"
        shape = tuple(self._size(name, value, d, index) for d in range(value.dim()))
        return TensorSpec(name, shape, value.dtype, role)

    def _size(self, name: str, value: torch.Tensor, dim: int, index: int | None) -> int | str:
        size = value.shape[dim]
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if expression.is_number:
            return int(expression)
        if isinstance(expression, sympy.Symbol) and expression not in self.names:
            known = self.dims[index].get(dim) if index is not None else None
            self.names[expression] = known or f"{name}_dim{dim}"
        named = {s: sympy.Symbol(self.names.get(s, s.name)) for s in expression.free_symbols}
        return str(expression.xreplace(named))

    def ranges(self, constraints: Mapping) -> dict[str, tuple[int, int | None]]:
        """Smallest and largest value (None: no limit) of each named size."""
        found = {}
        for symbol, bounds in constraints.items():
            if symbol in self.names:
                upper = int(bounds.upper) if bounds.upper.is_Integer else None
                lower = int(bounds.lower)
                found[self.names[symbol]] = (lower if lower > 2 else 1, upper)
        return found


def _dims(spec: pytree.TreeSpec, given: Any) -> list[dict[int, str]]:
    """For each leaf, the names that were given to its dimensions."""
    if spec.is_leaf():
        pairs = given.items() if isinstance(given, Mapping) else enumerate(given or ())
        named = {d: getattr(name, "__name__", name) for d, name in pairs}
        return [{d: name for d, name in named.items() if isinstance(name, str)}]
    children = list(given.values()) if isinstance(given, Mapping) else list(given or ())
    if len(children) != spec.num_children:
        children = [None] * spec.num_children
    parts = zip(spec.children(), children, strict=True)
    return [leaf for child, part in parts for leaf in _dims(child, part)]


@contextmanager
def _silence() -> Iterator[None]:
    """torch.export prints graphs and logs when it fails; the one error says it all."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)


def _explained(module: nn.Module, error: BaseException) -> RegraftError:
    kind, found = type(error).__name__, RegraftError
    text = str(error)
    mend = "mend the module, or compile the part of it that does export"
    if kind.startswith("GuardOnDataDependent"):
        reason = "Python control flow or a size depends on the values of a tensor"
        mend = "use torch.where or torch.cond, or compile the parts around it"
    elif "Constraints violated" in text:
        lines = [line.strip(" -") for line in text.splitlines() if line.startswith("  -")]
        reason = (lines or ["a dimension"])[0].split(". If you")[0]
        mend = "make the code take any size, or leave that dimension out of dynamic_shapes"
        found = InputError
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        reason = f"{kind}: {lines[0].split('For more info')[0].strip()}" if lines else kind
        if "missing a required" in text or "unexpected keyword" in text or "dynamic_shapes" in text:
            mend = "example_inputs and dynamic_shapes must fit forward's arguments"
            found = InputError
    name, line = type(module).__name__, failing_line(module, error)
    return found(f"{name} cannot be exported at {line}: {reason}; {mend}")


def failing_line(module: nn.Module, error: BaseException) -> str:
    """file:line of the innermost frame that is the user's, else of the module's forward."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [f for f in frames if not f.filename.startswith((TORCH, COEXEC, "<"))]
    if own:
        return f"{own[-1].filename}:{own[-1].lineno} ({(own[-1].line or '').strip()})"
    try:
        path = inspect.getsourcefile(type(module).forward)
        return f"{path}:{inspect.getsourcelines(type(module).forward)[1]}"
    except (OSError, TypeError):
        return f"{type(module).__qualname__}.forward"
