"""Operators that their schema defines by others: the function body as a graph."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir
from onnx import defs


def function_of(node: ir.Node, version: int, bound: Mapping[str, ir.Attr]) -> ir.Function | None:
    """The body that the node's schema gives it at an opset version; None where there is none."""
    try:
        schema = defs.get_schema(node.op_type, version, node.domain)
    except defs.SchemaError:
        return None
    if schema.has_function:
        known = [v for v in schema.function_opset_versions if v <= version]
        body = schema.get_function_with_opset_version(max(known)) if known else None
    elif schema.has_context_dependent_function:
        known = [v for v in schema.context_dependent_function_opset_versions if v <= version]
        proto = _resolved(node, bound)
        types = [
            _type(value).SerializeToString() if value is not None else b"" for value in node.inputs
        ]
        body = (
            schema.get_context_dependent_function_with_opset_version(
                max(known), proto.SerializeToString(), types
            )
            if known
            else None
        )
    else:
        body = None
    if not body:
        return None
    function = onnx.FunctionProto()
    function.ParseFromString(body if isinstance(body, bytes) else body.SerializeToString())
    _defaults(function, schema)
    return ir.serde.deserialize_function(function)


def _defaults(function: onnx.FunctionProto, schema: defs.OpSchema) -> None:
    """Give the body's attributes the defaults that the schema states."""
    given = {attribute.name for attribute in function.attribute_proto}
    for name, attribute in schema.attributes.items():
        if attribute.default_value.name and name not in given:
            function.attribute_proto.append(attribute.default_value)
            if name in function.attribute:
                function.attribute.remove(name)


def _resolved(node: ir.Node, bound: Mapping[str, ir.Attr]) -> onnx.NodeProto:
    proto = ir.serde.serialize_node(node)
    for attribute in list(proto.attribute):
        if attribute.ref_attr_name:
            actual = bound.get(attribute.ref_attr_name)
            name = attribute.name
            proto.attribute.remove(attribute)
            if actual is not None:
                copy = proto.attribute.add()
                copy.CopyFrom(ir.serde.serialize_attribute(actual))
                copy.name = name
    return proto


def _type(value: ir.Value) -> onnx.TypeProto:
    proto = onnx.TypeProto()
    if value.type is not None:
        ir.serde.serialize_type_into(proto, value.type)
        if value.shape is not None:
            ir.serde.serialize_shape_into(proto, value.shape)
    return proto
