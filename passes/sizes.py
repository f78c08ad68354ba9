"""Dynamic sizes as functions of the program's inputs."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import sympy
import torch
from torch import fx

from regraft.program import Program

sym_size = torch.ops.aten.sym_size.int


class Sizes:
    """Nodes that hold sizes, made once each, directly after the placeholders."""

    def __init__(self, program: Program) -> None:
        self.graph = program.graph
        self.made: dict[sympy.Expr, fx.Node] = {}
        self.symbols: dict[sympy.Expr, tuple[fx.Node, int]] = {}
        placeholders = self.graph.find_nodes(op="placeholder")
        self.anchor = placeholders[-1] if placeholders else next(iter(self.graph.nodes))
        for node in placeholders:
            for dim, size in enumerate(getattr(node.meta["val"], "shape", ())):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    self.symbols.setdefault(size.node.expr, (node, dim))

    def of(self, size: int | torch.SymInt) -> int | fx.Node | None:
        """A size as an int or a node; None where it is no sum or product of input sizes."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        found = self._emit(size.node.expr)
        if isinstance(found, fx.Node):
            found.meta["val"] = size
        return found

    def shape(self, tensor: torch.Tensor) -> list:
        return [self.of(size) for size in tensor.shape]

    def _emit(self, expr: sympy.Expr) -> Any:
        """An int, a node, or None."""
        if expr.is_Integer:
            return int(expr)
        if expr not in self.made:
            if expr in self.symbols:
                found = self._call(sym_size, *self.symbols[expr])
            elif expr.is_Add or expr.is_Mul:
                parts = [self._emit(part) for part in expr.args]
                if any(part is None for part in parts):
                    return None
                target = operator.add if expr.is_Add else operator.mul
                found = reduce(lambda a, b: self._call(target, a, b), parts)
            else:
                return None
            self.made[expr] = found
        return self.made[expr]

    def _call(self, target, *args) -> fx.Node:
        with self.graph.inserting_after(self.anchor):
            self.anchor = self.graph.call_function(target, args)
        return self.anchor

    def simplify(self) -> int:
        """Replace every size that the graph reads or computes; how many were replaced."""
        calls = [n for n in self.graph.nodes if n.op != "placeholder"]
        nodes = [n for n in calls if isinstance(n.meta.get("val"), torch.SymInt)]
        replaced = 0
        for node in nodes:
            found = self.of(node.meta["val"])
            if found is not None and found is not node:
                node.replace_all_uses_with(found)  # type: ignore[arg-type]
                self.graph.erase_node(node)
                replaced += 1
        return replaced
