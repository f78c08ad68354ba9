"""What a stretch of operators reads, writes and gives: the plan of the function to stand for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

Place = tuple[int, int]  # an entry and a tensor given to it, or its result r as -1 - r
Result = tuple[int, int]
LEAST = 8  # operators worth a function


class Unfit(Exception):
    """Why a stretch is not compiled; cuts: entries between whose others it may be."""

    def __init__(self, reason: str, cuts: Sequence[int] = ()) -> None:
        super().__init__(reason)
        self.cuts = list(cuts)


def operator(name: str, overload: str) -> Any:
    """The one with the names of its schema."""
    space, short = name.split("::")
    return getattr(getattr(getattr(torch.ops, space), short), overload or "default")


@dataclass(frozen=True)
class Backward:
    roots: list[Tensor]
    seeds: list[Tensor]
    leaves: list[Tensor]
    sums: list[Tensor | None]
    keep: bool


class Entry:
    """An operator or backward pass that was put off.

    ``given`` and ``outs`` are tensors, of which those to come have no value; an out is None where
    it is one of the given.
    """

    def __init__(self, described: tuple[Any, ...]) -> None:
        name, overload, args, self.grad, self.given, self.outs = described
        self.backward: Backward | None = None
        self.apart = False  # on another device than most
        self.op: Any = None
        self.args: list[Any] = args
        if not name:
            roots, leaves, keep = args
            counts = (roots, roots, leaves, leaves)
            ends = list(accumulate(counts))
            parts = [self.given[e - n : e] for e, n in zip(ends, counts, strict=True)]
            self.backward = Backward(parts[0], parts[1], parts[2], parts[3], keep)
            return
        self.op = operator(name, overload)

    @property
    def tags(self) -> Sequence[torch.Tag]:
        return self.op.tags if self.op else ()

    @property
    def random(self) -> bool:
        return torch.Tag.nondeterministic_seeded in self.tags or "dropout" in str(
            getattr(self.op, "_schema", "")
        )

    @property
    def name(self) -> str:
        return self.op._schema.name if self.op else "backward"

    def aliased(self) -> Iterator[Tensor]:
        """Arguments that are written, or that a result is a view of."""
        if self.backward:
            return
        for argument, value in zip(self.op._schema.arguments, self.args, strict=True):
            if argument.alias_info is not None:
                yield from (x for x in _flat(value) if isinstance(x, Tensor))

    def written(self) -> Iterator[Tensor]:
        if self.backward:
            yield from (x for x in self.backward.sums if x is not None)
            return
        statistics = "batch_norm" in self.name or "instance_norm" in self.name
        for argument, value in zip(self.op._schema.arguments, self.args, strict=True):
            alias = argument.alias_info is not None and argument.alias_info.is_write
            if alias or (statistics and str(argument.name).startswith("running")):
                yield from (x for x in _flat(value) if isinstance(x, Tensor))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


@dataclass
class Plan:
    """inputs: where the function's arguments are found; first: entries that run before it, as they
    are; outputs: results that Python still has; writes: inputs, by number; differentiable: by a
    later backward pass."""

    entries: list[Entry]
    numbers: dict[tuple[int, int, int], tuple[int, Any, bool]]
    outputs: list[Result]
    first: list[int] = field(default_factory=list)
    inputs: list[Place] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)
    differentiable: bool = False

    @property
    def varying(self) -> list[int]:
        """Numbers the function is given, by their place in the stretch."""
        before = set(self.first)
        return [
            number
            for (entry, _, _), (number, _, varies) in self.numbers.items()
            if varies and entry not in before
        ]


def _find_apart(entries: list[Entry]) -> None:
    """Marks what runs on the CPU in a stretch of another device's operators."""
    tensors = (x for entry in entries for x in (*entry.given, *entry.outs) if x is not None)
    if all(x.is_cpu for x in tensors):
        return
    for entry in entries:
        outs = [x.is_cpu for x in entry.outs if x is not None]
        given = [x.is_cpu for x in entry.given if x is not None]
        entry.apart = any(outs) or (not outs and bool(given) and all(given))


def plan(entries: list[Entry], numbers: Sequence[Any], wanted: Sequence[Result]) -> Plan:
    found = Plan(
        entries,
        {(e, a, i): (n, value, varies) for n, (e, a, i, value, varies) in enumerate(numbers)},
        [],
    )
    _find_apart(entries)
    made = {id(out): (e, r) for e, x in enumerate(entries) for r, out in enumerate(x.outs)}
    made.pop(id(None), None)
    passes = [e for e, entry in enumerate(entries) if entry.backward]
    first: set[int] = set()
    if passes:
        try:
            first = _kept_graphs(entries, made, wanted)
        except Unfit as unfit:
            raise Unfit(f"{unfit}: cut at its backward passes", passes) from unfit
    else:
        found.differentiable = any(entries[e].outs[r].requires_grad for e, r in wanted)
    first |= _picks(entries, made, first)
    apart = [e for e, entry in enumerate(entries) if entry.apart and e not in first]
    if apart:
        raise Unfit("it copies between devices: cut there", apart)
    _check_order(entries, first, made)
    found.first = sorted(first)
    if 2 * (len(entries) - len(first)) < min(len(entries), 2 * LEAST):
        raise Unfit("too little of it is left")
    found.outputs = [result for result in wanted if result[0] not in first]
    _find_inputs(found, made, first)
    return found


def _ancestors(entries: list[Entry], tensors: set[int], end: int) -> set[int]:
    """Tensors, by id, that gradients of these before entry ``end`` flow to."""
    reached = set(tensors)
    for entry in reversed(entries[:end]):
        if entry.backward or not entry.grad:
            continue
        touched = [out for out in entry.outs if out is not None] + list(entry.written())
        if any(id(x) in reached for x in touched):
            reached |= {id(x) for x in entry.given if x is not None and x.requires_grad}
    return reached


def _kept_graphs(
    entries: list[Entry], made: dict[int, Result], wanted: Sequence[Result]
) -> set[int]:
    """Entries of the graphs that a later backward pass needs: they run as they are."""
    spent: set[int] = set()
    for e, entry in enumerate(entries):
        if not entry.backward:
            continue
        behind = _ancestors(entries, {id(x) for x in entry.backward.roots}, e)
        for x in (x for earlier in entries[:e] for x in earlier.given if x is not None):
            if id(x) in behind and id(x) not in made and x.requires_grad and not x.is_leaf:
                raise Unfit("a backward pass goes on into the graph of earlier operators")
        if not entry.backward.keep:
            spent |= behind
    late = {
        id(out)
        for e, r in wanted
        if (out := entries[e].outs[r]).requires_grad and id(out) not in spent
    }
    if not late:
        return set()
    behind = _ancestors(entries, late, len(entries))
    if behind & spent & set(made):
        raise Unfit("one graph is differentiated now and later")
    todo, first = [made[x] for x in behind if x in made], set()
    while todo:
        e, _ = todo.pop()
        if e in first:
            continue
        if entries[e].backward:
            raise Unfit("gradients are differentiated again")
        first.add(e)
        todo += [made[id(x)] for x in entries[e].given if x is not None and id(x) in made]
    return first


def _picks(entries: list[Entry], made: dict[int, Result], first: set[int]) -> set[int]:
    """Entries that choose a part of a tensor given from outside, since which one may change, those
    that look at or write to such a part, and what runs on another device."""
    picks: set[int] = set()
    for e, entry in enumerate(entries):
        makers = {made[id(x)][0] for x in entry.given if id(x) in made}
        if e in first or entry.backward or not makers <= picks | first:
            continue
        if entry.grad and any(x is not None and x.requires_grad for x in entry.given):
            continue
        part = any(id(x) in made and made[id(x)][0] in picks for x in entry.aliased())
        if part or entry.apart or entry.name == "aten::select":
            picks.add(e)
    return picks


def _memory(x: Tensor, entries: list[Entry], made: dict[int, Result]) -> int:
    """What a tensor from outside, or a view of one, is stored in; 0 for one that is made here."""
    while id(x) in made:
        base = next(entries[made[id(x)][0]].aliased(), None)
        if base is None:
            return 0
        x = base
    return x.untyped_storage()._cdata


def _check_order(entries: list[Entry], first: set[int], made: dict[int, Result]) -> None:
    """What runs first must not be what others were to come before."""
    wrote: set[int] = set()
    read: set[int] = set()
    random = False

    def outside(tensors: Any) -> set[int]:
        return {_memory(x, entries, made) for x in tensors if x is not None} - {0}

    for e, entry in enumerate(entries):
        reads, writes = outside(entry.given), outside(entry.written())
        if e not in first:
            read, wrote, random = read | reads, wrote | writes, random or entry.random
        elif reads & wrote or writes & read or (random and entry.random):
            raise Unfit(f"{entry.name} cannot run before the rest")


def _find_inputs(found: Plan, made: dict[int, Result], first: set[int]) -> None:
    known: set[int] = set()
    written: set[int] = set()
    for e, entry in enumerate(found.entries):
        if e in first:
            continue
        for at, x in enumerate(entry.given):
            if x is None or id(x) in known:
                continue
            place: Place = (e, at)
            if id(x) in made:
                maker, result = made[id(x)]
                if maker not in first:
                    continue
                place = (maker, -1 - result)
            elif not entry.backward and not any(arg is x for arg in _flat(entry.args)):  # a number
                continue
            known.add(id(x))
            found.inputs.append(place)
            found.tensors.append(x)
        written |= {_viewed(x, found.entries, made, first) for x in entry.written()}
    found.writes = [number for number, x in enumerate(found.tensors) if id(x) in written]
    _check_sharing(found, made)


def _viewed(x: Tensor, entries: list[Entry], made: dict[int, Result], first: set[int]) -> int:
    """The tensor, by id, that this one is a view of, as far as the function sees."""
    while id(x) in made and made[id(x)][0] not in first:
        base = next(entries[made[id(x)][0]].aliased(), None)
        if base is None:
            break
        x = base
    return id(x)


def _check_sharing(found: Plan, made: dict[int, Result]) -> None:
    """What the function writes to is no other input's memory, as is looked at before each call."""
    memory = [_memory(x, found.entries, made) for x in found.tensors]
    for number in found.writes:
        if memory[number] and memory.count(memory[number]) > 1:
            raise Unfit("it writes to memory that two of its tensors share")
