"""A traced stretch, cut into pieces where it is long, that C++ calls without Python.

Each is compiled by Inductor's C++ wrapper. What passes from one to the next are values that own
their memory: views are made anew where they are used.
"""

from __future__ import annotations

import ctypes
import logging
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

LEAST, LONG = 8, 96  # entries of a part, and of a stretch without backward passes that is cut
ENTRY = "_Z19inductor_entry_implPP16AtenTensorOpaqueS1_"  # of every module of that wrapper
RELEASE = "py::gil_scoped_release_simple release;"
IF_HELD = "if (PyGILState_Check()) release.emplace();"
ASKED = f"std::optional<py::gil_scoped_release_simple> release; {IF_HELD}"


@dataclass(frozen=True)
class Part:
    """Inputs, outputs and writes are values by number: the graph's inputs, the numbers that vary,
    then what parts give."""

    end: int
    module: GraphModule
    inputs: list[int]
    outputs: list[int]
    writes: list[int]


# the value that a result is a view of, that one's strides, and its own sizes, strides and offset
View = tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


@dataclass
class Pieces:
    """places: calls up to the end of each, inputs, outputs and writes; files: their libraries, that
    stay loaded. Raises OSError."""

    places: Sequence[tuple[int, list[int], list[int], list[int]]]
    results: Sequence[View]
    files: Sequence[Path]

    def __post_init__(self) -> None:
        self.addresses = [_address(file) for file in self.files]


def ends(calls: Sequence[int], passes: Sequence[int], length: int) -> list[int]:
    """The entries where the parts of a stretch end, of these calls and backward passes: amid the
    first forward pass and after the last backward pass. Long ones without are cut at the thirds."""
    if passes:
        inner = [calls[calls.index(passes[0]) // 2], passes[-1] + 1]
    else:
        inner = [calls[len(calls) // 3], calls[2 * len(calls) // 3]] if length > LONG else []
    found = [0]
    for end in inner:
        if end - found[-1] >= LEAST and end < length:
            found.append(end)
    return [*found[1:], length]


def cut(graph: Graph, ends: Sequence[int], inputs: int) -> tuple[list[Part], list[View]] | None:
    """The parts and what the results are of their values; None where it cannot be cut.

    Nodes carry the number of their entry in ``meta``. inputs: of the graph, but for the numbers
    that vary, which are the value of that number. Parts of which one writes to what another made
    are one.
    """
    try:
        return _Cut(graph, ends, inputs).parts()
    except _Whole:
        return None


class _Whole(Exception):
    pass


class _Cut:
    def __init__(self, graph: Graph, ends: Sequence[int], inputs: int) -> None:
        self.ends = list(ends)
        nodes = list(graph.nodes)
        if any(node.op not in ("placeholder", "call_function", "output") for node in nodes):
            raise _Whole
        places = [node for node in nodes if node.op == "placeholder"]
        self.values = {node: number for number, node in enumerate(places)}
        self.count = inputs + 1
        self.calls = [node for node in nodes if node.op == "call_function"]
        self.results = list(nodes[-1].args[0])
        self._assign()
        for node in self.calls:
            for target in written(node):
                base, last = origin(target), self.part[node]
                if base in self.part and (made := self.part[base]) != last:
                    del self.ends[made:last]  # one part makes it and writes to it
                    self._assign()

    def _assign(self) -> None:
        self.part = {node: bisect_right(self.ends, node.meta["entry"]) for node in self.calls}

    def parts(self) -> tuple[list[Part], list[View]]:
        needed = [self._needed(k) for k in range(len(self.ends))]
        kept: list[dict[Node, None]] = [{} for _ in self.ends]
        for node in (*map(origin, self.results), *(n for outside in needed for n in outside)):
            if node in self.part:
                kept[self.part[node]][node] = None
        made = []
        for k, end in enumerate(self.ends):
            for node in kept[k]:
                self.values[node] = self.count
                self.count += 1
            made.append(self._emit(k, end, needed[k], list(kept[k])))
        return made, [self._view(node) for node in self.results]

    def _view(self, node: Node) -> View:
        base = origin(node)
        val, of = node.meta["val"], base.meta["val"]
        if val.dtype != of.dtype or val.is_conj() != of.is_conj() or val.is_neg() != of.is_neg():
            raise _Whole
        offset = val.storage_offset() - of.storage_offset()
        return self.values[base], of.stride(), tuple(val.shape), val.stride(), offset

    def _needed(self, k: int) -> list[Node]:
        """Nodes from outside, whose values the part is given."""
        found: dict[Node, None] = {}
        todo = [n for node in self.calls if self.part[node] == k for n in node.all_input_nodes]
        seen: set[Node] = set()
        while todo:
            node = todo.pop()
            if node in seen or self.part.get(node) == k:
                continue
            seen.add(node)
            if node.op == "call_function" and (source := _source(node)) is not None:
                todo += source.all_input_nodes if source is node else [source]
            else:
                found[node] = None
        return sorted(found, key=lambda n: (n not in self.part, self.values.get(n, 0), n.name))

    def _emit(self, k: int, end: int, needed: list[Node], outputs: list[Node]) -> Part:
        graph = Graph()
        made: dict[Node, Node] = {}
        for node in needed:
            made[node] = graph.placeholder(node.name)
            made[node].meta["val"] = node.meta["val"]

        def get(node: Node) -> Node:
            if node not in made:
                source = _source(node)
                assert source is not None
                made[node] = graph.node_copy(node, get) if source is node else get(source)
            return made[node]

        writes: dict[int, None] = {}
        for node in self.calls:
            if self.part[node] == k:
                made[node] = graph.node_copy(node, get)
                bases = map(origin, written(node))
                writes |= {self.values[b]: None for b in bases if b not in self.part}
        graph.output(tuple(made[node] for node in outputs))
        module = GraphModule({}, graph)
        inputs = [self.values[node] for node in needed]
        return Part(end, module, inputs, [self.values[node] for node in outputs], list(writes))


def _source(node: Node) -> Node | None:
    """The node itself if it makes a view, what it wrote to if it did that; None otherwise."""
    if node.op != "call_function":
        return None
    if not isinstance(node.target, torch._ops.OpOverload):
        item = node.args[0]  # getitem, of what gave several results
        assert isinstance(item, Node)
        return node if _source(item) is item else None
    returns = node.target._schema.returns
    alias = returns[0].alias_info if returns else None
    if alias is None:
        return None
    return written(node)[0] if alias.is_write else node


def origin(node: Node) -> Node:
    """The node whose memory this one's value is in."""
    while (source := _source(node)) is not None:
        node = source.args[0] if source is node else source  # type: ignore[assignment]
    return node


def written(node: Node) -> list[Node]:
    """The nodes whose values this one writes to."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    schema = node.target._schema
    statistics = "batch_norm" in schema.name and "backward" not in schema.name
    found: list[Node] = []
    for number, argument in enumerate(schema.arguments):
        value = node.args[number] if number < len(node.args) else node.kwargs.get(argument.name)
        alias = argument.alias_info is not None and argument.alias_info.is_write
        if alias or (statistics and argument.name.startswith("running")):
            found += [x for x in (value if isinstance(value, list | tuple) else [value])
                      if isinstance(x, Node)]  # fmt: skip
    return found


def compiled(part: Part, options: dict[str, Any]) -> Path | None:
    """The library of the part; None where that is not to be called so."""
    from torch._functorch import config as aot
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    found: list[Any] = []

    def inner(*args: Any, **kwargs: Any) -> Any:
        found.append(compile_fx_inner(*args, **kwargs))
        return found[-1]

    examples = [n.meta["val"].detach() for n in part.module.graph.nodes if n.op == "placeholder"]
    options = options | {"cpp_wrapper": True}
    with torch.no_grad(), config.patch(options), aot.patch(enable_autograd_cache=False):
        with _callable_anywhere(), _no_remarks():
            compile_fx(part.module, examples, inner_compile=inner)
    (code,) = found
    text = code.source_code
    entry = getattr(code.current_callable, "__globals__", {}).get("inductor_entry")
    given = re.search(r"steal_from_raw_handles_to_raii_handles\(input_handles, (\d+)\)", text)
    made = re.search(r"num_outputs=(\d+)", text)
    counts = [int(match[1]) if match else -1 for match in (given, made)]
    if entry is None or IF_HELD not in text or counts != [len(part.inputs), len(part.outputs)]:
        return None
    return Path(entry.__self__.__file__)


def _address(file: Path) -> int:
    """Of the code of a library."""
    code = getattr(ctypes.CDLL(str(file)), ENTRY, None)
    address = ctypes.cast(code, ctypes.c_void_p).value if code else None
    if address is None:
        raise OSError(f"{file} is not a piece")
    return address


@contextmanager
def _callable_anywhere() -> Iterator[None]:
    """Code that is generated in the block lets go of the GIL where it has it."""
    from torch._inductor.codegen import common

    common.init_backend_registration()
    before = common.device_codegens["cpu"]
    wrapper = before.cpp_wrapper_codegen

    class Wrapper(wrapper):  # type: ignore[misc, valid-type]
        @staticmethod
        def create(*args: Any, **kwargs: Any) -> Any:
            return Wrapper()

        def generate(self, is_inference: bool) -> Any:
            code, *rest = super().generate(is_inference)
            code.value = code.value.replace(RELEASE, ASKED)
            return code, *rest

    common.device_codegens["cpu"] = type(before)(
        before.scheduling, before.wrapper_codegen, Wrapper, before.fx_wrapper_codegen
    )
    try:
        yield
    finally:
        common.device_codegens["cpu"] = before


@contextmanager
def _no_remarks() -> Iterator[None]:
    """Inductor tells of operators that its C++ code calls through the dispatcher."""
    logger = logging.getLogger("torch._inductor.ir")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
