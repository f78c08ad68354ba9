"""A graph as the list of steps that run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from regraft.frontends.onnx import expand, registry
from regraft.frontends.onnx.packed import kept_packed
from regraft.frontends.onnx.values import Host, as_numbers, as_tensor, constant
from regraft.program import RegraftError

if TYPE_CHECKING:
    from regraft.frontends.onnx.module import OnnxModule


@dataclass
class Step:
    """One node: how to compute its outputs, and which values nobody needs after it."""

    label: str
    call: Callable[..., Any]
    host: frozenset[int]
    raw: bool
    on_host: Callable[..., Any] | None
    inputs: list[ir.Value | None]
    outputs: list[ir.Value]
    attributes: dict[str, Any]
    bodies: dict[str, Plan] = field(default_factory=dict)
    done: list[ir.Value] = field(default_factory=list)

    def run(self, env: dict[ir.Value, Any]) -> None:
        inputs = [None if v is None else env[v] for v in self.inputs]
        try:
            results = self._compute(inputs, env)
        except RegraftError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            raise RegraftError(f"{self.label}: {type(error).__name__}: {lines[0]}") from error
        if not isinstance(results, tuple):
            results = (results,)
        if len(results) < len(self.outputs):
            raise RegraftError(f"{self.label} has {len(self.outputs)} outputs, not {len(results)}")
        env.update(zip(self.outputs, results, strict=False))
        for value in self.done:
            env.pop(value, None)

    def _compute(self, inputs: list[Any], env: dict[ir.Value, Any]) -> Any:
        if self.on_host and inputs and all(x is None or isinstance(x, Host) for x in inputs):
            results = self.on_host(*inputs, **self.attributes)
            if results is not None:
                return results
        given = [
            as_numbers(x) if index in self.host else x if self.raw else as_tensor(x)
            for index, x in enumerate(inputs)
        ]
        bodies = {name: partial(body.run_inside, env) for name, body in self.bodies.items()}
        return self.call(*given, **self.attributes, **bodies)


class Plan:
    """A graph, or a function's body with its attributes, in the order in which it runs."""

    def __init__(
        self,
        graph: ir.Graph,
        module: OnnxModule,
        opsets: Mapping[str, int],
        bound: Mapping[str, ir.Attr] | None = None,
        depth: int = 0,
    ) -> None:
        if depth > 64:
            raise RegraftError(f"{graph.name}: functions call each other too deeply")
        self.module, self.opsets, self.bound, self.depth = module, opsets, bound or {}, depth
        self.inputs, self.outputs = list(graph.inputs), list(graph.outputs)
        self.constants: dict[ir.Value, Callable[[], Any]] = {}
        for value in graph.initializers.values():
            if value.const_value is not None:
                self.hold(value, constant(value.const_value))
        self.steps = [step for node in graph if (step := self._made(node)) is not None]
        self.captured = self._captured()
        self._find_last_uses()

    def run(self, inputs: Sequence[Any], outer: Mapping[ir.Value, Any] | None = None) -> list[Any]:
        """The graph's outputs; missing inputs must have initialisers."""
        env: dict[ir.Value, Any] = {value: give() for value, give in self.constants.items()}
        env.update(zip(self.inputs, inputs, strict=False))
        if outer is not None:
            env.update((value, outer[value]) for value in self.captured)
        for step in self.steps:
            step.run(env)
        return [env[value] for value in self.outputs]

    def run_inside(self, env: Mapping[ir.Value, Any], *inputs: Any) -> tuple[Any, ...]:
        return tuple(self.run(inputs, env))

    def run_function(self, *inputs: Any) -> tuple[Any, ...]:
        missing = [None] * (len(self.inputs) - len(inputs))
        return tuple(self.run([*inputs, *missing]))

    def _made(self, node: ir.Node) -> Step | None:
        label = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        label += f" {node.name!r}" if node.name else f" of {_first(node)!r}"
        try:
            return self._step(node, label)
        except RegraftError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise RegraftError(f"{label} is not valid: {reason[0]}: export it again") from error

    def _step(self, node: ir.Node, label: str) -> Step | None:
        attributes, bodies = self._attributes(node)
        if node.domain == "" and node.op_type == "Constant":
            self.hold(node.outputs[0], _constant(attributes))
            return None
        if kept := kept_packed(self, node):
            call, inputs = kept
            return Step(label, call, frozenset(), False, None, inputs, list(node.outputs), {})
        key = (node.domain, node.op_type, node.overload)
        if key in self.module.functions and (own := _own(node, self.module.functions[key])):
            known, settings = own
            inputs, outputs = list(node.inputs), list(node.outputs)
            return Step(
                label, known.function, known.host, known.raw, None, inputs, outputs, settings
            )
        if key in self.module.functions:
            return self._call(node, label, attributes, self.module.functions[key])
        version = self.opsets.get(node.domain, 1)
        known = registry.handler(node.domain, node.op_type, version)
        if known is None or not (
            known.any_keyword or known.keywords >= (attributes.keys() | bodies.keys())
        ):
            body = expand.function_of(node, version, self.bound)
            if body is None:
                raise RegraftError(_unsupported(node, label, version, known, attributes))
            return self._call(node, label, attributes, body)
        if "outputs" in known.keywords:
            attributes["outputs"] = len(node.outputs)
        if "types" in known.keywords:
            attributes["types"] = [v.dtype if v is not None else None for v in node.inputs]
        on_host = registry.host_handler(node.domain, node.op_type)
        inputs, outputs = list(node.inputs), list(node.outputs)
        return Step(
            label, known.function, known.host, known.raw, on_host,
            inputs, outputs, attributes, bodies,
        )  # fmt: skip

    def _call(
        self, node: ir.Node, label: str, attributes: dict[str, Any], function: ir.Function
    ) -> Step:
        bound: dict[str, ir.Attr] = {
            name: attr for name, attr in function.attributes.items() if attr.value is not None
        }
        for name, attr in node.attributes.items():
            actual = self.bound.get(attr.ref_attr_name or "") if attr.is_ref() else attr
            if actual is not None:
                bound[name] = actual
        opsets = {**self.opsets, **function.opset_imports}
        plan = Plan(function.graph, self.module, opsets, bound, self.depth + 1)
        inputs, outputs = list(node.inputs), list(node.outputs)
        return Step(label, plan.run_function, frozenset(), True, None, inputs, outputs, {})

    def _attributes(self, node: ir.Node) -> tuple[dict[str, Any], dict[str, Plan]]:
        attributes: dict[str, Any] = {}
        bodies: dict[str, Plan] = {}
        for name, attr in node.attributes.items():
            actual = self.bound.get(attr.ref_attr_name or "") if attr.is_ref() else attr
            if actual is None:
                continue
            if actual.type == ir.AttributeType.GRAPH:
                bodies[name] = Plan(
                    actual.as_graph(), self.module, self.opsets, self.bound, self.depth + 1
                )
            elif actual.type == ir.AttributeType.TENSOR:
                attributes[name] = constant(actual.as_tensor())
            elif actual.type == ir.AttributeType.TENSORS:
                attributes[name] = [constant(t) for t in actual.as_tensors()]
            else:
                attributes[name] = actual.value
        return attributes, bodies

    def hold(self, value: ir.Value, held: Any) -> None:
        self.constants[value] = self.module.hold(value.name or "constant", held)

    def _captured(self) -> list[ir.Value]:
        """Values of outer graphs that this one reads."""
        own = {*self.inputs, *self.constants}
        read: dict[ir.Value, None] = {}
        for step in self.steps:
            read |= dict.fromkeys(_reads(step))
            own |= set(step.outputs)
        read |= dict.fromkeys(self.outputs)
        return [value for value in read if value not in own]

    def _find_last_uses(self) -> None:
        kept = {*self.outputs, *self.captured, *self.constants, *self.inputs}
        for step in reversed(self.steps):
            used = dict.fromkeys([*_reads(step), *step.outputs])
            step.done = [value for value in used if value not in kept]
            kept |= set(step.done)


def _reads(step: Step) -> list[ir.Value]:
    inner = [value for body in step.bodies.values() for value in body.captured]
    return [*(v for v in step.inputs if v is not None), *inner]


def _first(node: ir.Node) -> str:
    return next((v.name for v in node.outputs if v.name), "?")


def _constant(attributes: dict[str, Any]) -> Any:
    ((name, value),) = attributes.items()
    if name in ("value", "sparse_value"):
        return value
    if name in ("value_string", "value_strings"):
        from regraft.frontends.onnx.values import strings

        return strings(value)
    integers = name in ("value_int", "value_ints")
    return torch.tensor(value, dtype=torch.int64 if integers else torch.float32)


def _unsupported(
    node: ir.Node, label: str, version: int, known: registry.Operator | None, attributes: dict
) -> str:
    if known is not None:
        extra = sorted(set(attributes) - known.keywords)
        return f"{label}: attribute {extra[0] if extra else '?'!r} is unknown at opset {version}"
    others = registry.names(node.domain)
    if not others:
        domains = ", ".join(name or "ai.onnx" for name in registry.domains())
        return f"{label}: domain {node.domain!r} is unknown, there are {domains}"
    near = get_close_matches(node.op_type, others, 3) or others[:12]
    where = node.domain or "ai.onnx"
    return (
        f"{label} is not supported at opset {version}: rewrite it in operators of {where} that "
        f"are, such as {', '.join(near)}"
    )


def _own(node: ir.Node, function: ir.Function) -> tuple[registry.Operator, dict] | None:
    """The handler of a function that Regraft exported, and the settings that it was made with."""
    known = registry.handler(node.domain, node.op_type.split("_")[0], 1)
    if known is None or not node.domain:
        return None
    settings = {name: attr.value for name, attr in function.attributes.items()}
    return known, {name: value for name, value in settings.items() if name in known.keywords}
