"""Attention that a model computes by hand becomes one operator.

It is recognised by what it computes, not by how it is spelled: the operators between the product
of queries and keys and the softmax are run on the program's examples, which tells their scale
and soft cap; run on zeros, they are the bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from regraft.passes.base import Context, Pass, PassResult, is_call
from regraft.passes.regions import between
from regraft.passes.rotation import STOPS
from regraft.passes.sizes import Sizes
from regraft.program import Program
from regraft.program.program import source_of

aten = torch.ops.aten
regraft = torch.ops.regraft
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
SDPA = aten.scaled_dot_product_attention.default
PRODUCT = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
MOVE = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default,
        aten.transpose.int, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.clone.default, aten.contiguous.default, aten.to.dtype,
        aten.to.device,
        aten.repeat_interleave.self_int, aten.repeat.default, aten.flatten.using_ints,
        aten.unflatten.int, aten.numpy_T.default, aten.mT.default, aten.detach.default,
        aten.dropout.default, aten.alias.default)  # fmt: skip
SCALE = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
VISIBLE = 1e3


class _NoMatch(Exception):
    """Why a softmax is no attention over cached keys and values."""


@dataclass(frozen=True)
class RaiseSoftmax(Pass):
    """softmax(cap tanh(c q k' / cap) + b) v -> attention(q, k, v, b, c, cap)    exact

    k and v are cached; the bias b holds masks and position biases. Without cap, cap tanh(x / cap)
    is x.
    """

    def apply(self, program: Program, context: Context) -> PassResult:
        graph = program.graph
        matches, skipped = 0, []
        raiser: _Raiser | None = None
        for node in [n for n in graph.nodes if n.target in (*SOFTMAX, SDPA)]:
            scores, keys = _scores(node)
            if keys is None:
                continue
            raiser = raiser or _Raiser(program)
            try:
                if node.target == SDPA:
                    raiser.rewrite_fused(node, keys)
                else:
                    raiser.rewrite(node, scores, keys)
                matches += 1
            except _NoMatch as error:
                skipped.append((source_of(node), str(error)))
        return PassResult(matches, tuple(skipped))


def _scores(softmax: fx.Node) -> tuple[Any, Any]:
    """The product above a softmax that multiplies by cached keys, and their update."""
    if softmax.target == SDPA:
        return None, _cached(softmax.args[1])
    seen, stack = set(), [softmax.args[0]]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.target in PRODUCT:
            keys = _cached(_operands(node)[1])
            if keys is not None:
                return node, keys
        elif node.target not in (*SOFTMAX, *STOPS):
            stack.extend(node.all_input_nodes)
    return None, None


def _operands(product: fx.Node) -> tuple[Any, Any]:
    return product.args[-2], product.args[-1]  # type: ignore[return-value]


def _cached(node: Any) -> fx.Node | None:
    """The kv_update whose result this node moves about and scales."""
    while isinstance(node, fx.Node) and not is_call(node, regraft.kv_update.default):
        node = _moved(node)
    return node


def _moved(node: fx.Node) -> Any:
    """The tensor that a node moves about or multiplies by a number; None for other nodes."""
    scaled = node.target in SCALE and not (
        isinstance(node.args[1], fx.Node) and node.args[1].meta["val"].dim()
    )
    return node.args[0] if node.target in MOVE or scaled else None


class _Raiser:
    def __init__(self, program: Program) -> None:
        self.graph = program.graph
        self.sizes = Sizes(program)
        self.made: dict[str, fx.Node] = {}
        interpreter = fx.Interpreter(program.graph_module, garbage_collect_values=False)
        with torch.no_grad():
            interpreter.run(*program.examples)
        self.values: dict[Any, Any] = interpreter.env

    def rewrite_fused(self, node: fx.Node, keys: fx.Node) -> None:
        """scaled_dot_product_attention with a mask [batch, heads or 1, queries, keys]."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        update, mask = _cached(given["value"]), given.get("attn_mask")
        if update is None:
            raise _NoMatch("its values are not cached")
        if mask is None or self.values[mask].dim() != 4 or given.get("dropout_p"):
            raise _NoMatch("it has no mask for every query and key, or drops weights")
        for moved, cached in ((given["key"], keys), (given["value"], update)):
            if self._same_heads(self.values[moved], self.values[cached]) != 1.0:
                raise _NoMatch("keys or values are scaled after the cache")
        size = self.values[keys].shape[-1]
        scale = given.get("scale") or size**-0.5
        with self.graph.inserting_before(node):
            raised = self._call(regraft.attention.default, given["query"], keys, update, mask,
                                None, scale, 0.0)  # fmt: skip
        if not _close(self.values[raised], self.values[node]):
            raise _NoMatch("it computes something else")
        raised.meta = dict(node.meta)
        node.replace_all_uses_with(raised)
        self.graph.erase_node(node)

    def rewrite(self, softmax: fx.Node, scores: fx.Node, keys: fx.Node) -> None:
        if softmax.args[1] not in (-1, self.values[softmax].dim() - 1):
            raise _NoMatch("softmax is not over keys")
        context = self._context(softmax)
        update = _cached(_operands(context)[1])
        if update is None:
            raise _NoMatch("what it multiplies by the weights are not cached values")
        query, right = _operands(scores)
        k, v = self.values[keys], self.values[update]
        factor = self._same_heads(self.values[right].mT, k)
        if self._same_heads(self.values[_operands(context)[1]], v) != 1.0:
            raise _NoMatch("the values are scaled")
        batch, _, rows, size = self.values[keys.args[1]].shape
        value = self.values[query]
        heads, rest = divmod(value.numel(), batch * rows * size)
        if rest or value.shape[:-1] != self.values[scores].shape[:-1]:
            raise _NoMatch("queries and keys are not [batch, heads, length, size]")
        shape = [*self.sizes.shape(keys.args[1].meta["val"])]
        shape[1] = heads
        with self.graph.inserting_before(context):
            if scores.target == aten.baddbmm.default:
                scores = self._split(scores)
            chain = between(self.graph, [scores], [softmax.args[0]])
            scale, softcap = self._measure(chain, scores, softmax.args[0])
            bias = self._bias(chain, scores, softmax.args[0], shape)
            q, q_factor = self._unscaled(query, (batch, heads, rows, size))
            scale *= factor * q_factor
            if self.values[q].shape != (batch, heads, rows, size):
                q = self._call(aten.reshape.default, q, shape)
            raised = self._call(regraft.attention.default, q, keys, update, bias, None, scale,
                                softcap)  # fmt: skip
            out = raised
            if self.values[raised].shape != self.values[context].shape:
                wanted = self.sizes.shape(context.meta["val"])
                out = self._call(aten.reshape.default, raised, wanted)
        if not _close(self.values[out], self.values[context]):
            raise _NoMatch("it is not softmax(c q k' + b) v")
        raised.meta["source"] = source_of(softmax)
        raised.meta["val"] = torch.empty_like(context.meta["val"]).reshape(
            *(keys.args[1].meta["val"].shape[0], heads), -1, v.shape[-1]
        )
        q.meta.setdefault(
            "val", query.meta["val"].reshape(raised.meta["val"].shape[0], heads, -1, size)
        )
        out.meta.setdefault("val", context.meta["val"])
        context.replace_all_uses_with(out)
        self.graph.erase_node(context)

    def _context(self, softmax: fx.Node) -> fx.Node:
        node = softmax
        while True:
            users = _unguarded(node)
            if len(users) != 1:
                raise _NoMatch("the attention weights are used more than once")
            (user,) = users
            if user.target in (aten.matmul.default, aten.bmm.default) and user.args[0] is node:
                return user
            if user.target not in (*MOVE, aten.where.self) and not _is_guard(user):
                raise _NoMatch(f"{user.name} changes the attention weights")
            node = user

    def _unscaled(self, query: fx.Node, shape: tuple[int, ...]) -> tuple[fx.Node, float]:
        """The node of this shape that the queries are multiples of, and the factor."""
        value, node, found = self.values[query], query, (query, 1.0)
        while (node := _moved(node)) is not None:
            source = self.values[node]
            if source.shape == shape:
                rows = value.reshape(shape).float()
                factor = ((rows * source).sum() / (source * source).sum()).item()
                if not _close(rows, factor * source.float()):
                    break
                found = node, 1.0 if abs(factor - 1) < 1e-6 else factor
        return found

    def _same_heads(self, moved: Tensor, cached: Tensor) -> float:
        """c where moved is c times the cached tensor with its heads repeated in groups."""
        batch, heads, length, size = cached.shape
        repeated = moved.numel() // cached.numel()
        if moved.shape[-2:] != (length, size) or moved.numel() % cached.numel():
            raise _NoMatch("keys or values are not those of the cache")
        moved = moved.reshape(batch, heads * repeated, length, size).float()
        cached = cached.repeat_interleave(repeated, 1).float()
        factor = ((moved * cached).sum() / (cached * cached).sum()).item()
        if abs(factor - 1) < 1e-6:
            factor = 1.0
        if not _close(moved, factor * cached):
            raise _NoMatch("the heads of keys or values are not repeated in groups")
        return factor

    def _split(self, node: fx.Node) -> fx.Node:
        """beta * input + alpha * (a @ b) in place of a baddbmm; the product."""
        bias, left, right = node.args
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        with self.graph.inserting_before(node):
            product = self._call(aten.bmm.default, left, right)
            product.meta = dict(node.meta)
            scaled = self._call(aten.mul.Tensor, product, alpha)
            added = self._call(aten.mul.Tensor, bias, beta) if beta != 1 else bias
            total = self._call(aten.add.Tensor, scaled, added)
        node.replace_all_uses_with(total)
        self.graph.erase_node(node)
        return product

    def _run(self, chain: list[fx.Node], start: fx.Node, end: Any, value: Tensor) -> Tensor:
        env = {start: value}
        for node in chain:
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda n: env[n] if n in env else self.values[n]
            )
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return env[end].float()

    def _measure(self, chain, scores, end) -> tuple[float, float]:
        """Scale and soft cap of the chain from products to softmax."""
        x = self.values[scores]
        base = self._run(chain, scores, end, torch.zeros_like(x))
        seen = base.abs() < VISIBLE
        if not seen.any():
            raise _NoMatch("every key is masked")

        def rise(factor: float) -> Tensor:
            return (self._run(chain, scores, end, factor * x) - base)[seen]

        flat = x.float().reshape(base.shape)[seen]
        scale = ((rise(1e-2) * flat).sum() / (flat * flat).sum()).item() / 1e-2
        if _close(rise(1.0), scale * flat) and _close(rise(8.0), 8 * scale * flat):
            return scale, 0.0
        cap = rise(1e6).abs().max().item()
        if _close(rise(1.0), cap * torch.tanh(scale * flat / cap), 1e-4):
            return scale, cap
        raise _NoMatch("the scores are not scaled and soft-capped products")

    def _bias(self, chain, scores, end, shape) -> fx.Node:
        """The chain of operators at zero, in the graph."""
        meta = scores.meta["val"]
        zeros = self._call(aten.zeros.default, self.sizes.shape(meta), dtype=meta.dtype,
                           device=meta.device)  # fmt: skip
        copies: dict[fx.Node, fx.Node] = {scores: zeros}
        for node in chain:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: copies.get(n, n))
            copies[node] = self._call(node.target, *args, **kwargs)
            copies[node].meta.setdefault("val", node.meta.get("val"))
        bias = copies[end]
        if self.values[bias].dim() == 4:
            return bias
        length = self.sizes.of(meta.shape[-1])
        return self._call(aten.reshape.default, bias, [*shape[:3], length])

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A node, or the same one made before, and its value on the examples."""
        key = repr((str(target), args, kwargs))
        if key not in self.made:
            node = self.graph.call_function(target, args, kwargs)
            run_args, run_kwargs = fx.map_arg((args, kwargs), self._value)
            with torch.no_grad():
                self.values[node] = target(*run_args, **run_kwargs)
            self.made[key] = node
        return self.made[key]

    def _value(self, node: fx.Node) -> Any:
        if node not in self.values:
            args = fx.map_arg(node.args, self._value)
            self.values[node] = node.target(*args)  # type: ignore[operator]
        return self.values[node]


def _unguarded(weights: fx.Node) -> list[fx.Node]:
    """The users of weights, less the test for rows without a key in where(isnan(w), 0, w)."""
    users = list(weights.users)
    tests = [user for user in users if user.target == aten.isnan.default]
    guards = [user for user in users if user.target == aten.where.self and user.args[0] in tests]
    return guards if len(guards) == 1 and len(users) == 2 else users


def _is_guard(node: fx.Node) -> bool:
    """Whether it makes the weights of rows without a key zero."""
    fills = is_call(node, aten.masked_fill.Scalar) and node.args[2:] == (0,)
    return fills and is_call(node.args[1], aten.all.dim)


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())
