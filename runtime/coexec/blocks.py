"""A trace graph for the eye: paths of like operators merged, runs without a branch as one block."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

# parent, operator, visits, ends, source line, waits by source line
Node = tuple[int, str, int, int, str, dict[str, int]]
LONGEST_LOOP = 4  # blocks a turn
VIEWS = frozenset(
    "alias chunk contiguous detach expand expand_as flatten narrow permute reshape select slice "
    "split split_with_sizes squeeze t to transpose unbind unflatten unsqueeze view view_as".split()
)


@dataclass
class Block:
    """Operators that follow each other on every path; turns of them, where a loop is unrolled.

    visits: times that the first ran; ends: calls whose path ends at the last; line: of the program,
    where paths part before it; waits: of Python, after it or in it, by line; variants: paths that
    differ in sizes or numbers alone.
    """

    operators: list[str]
    visits: int
    ends: int = 0
    line: str = ""
    waits: Counter[str] = field(default_factory=Counter)
    variants: int = 1
    turns: int = 1
    children: list[Block] = field(default_factory=list)

    def like(self, other: Block) -> bool:
        return self.operators == other.operators and self.waits.keys() == other.waits.keys()

    def names(self, most: int = 6) -> list[str]:
        """The operators that matter, in their order: "linear ×8", "gelu"."""
        counts = Counter(self.operators)
        apart = {name: n for name, n in counts.items() if name not in VIEWS} or counts
        kept = sorted(apart, key=lambda name: (name != "backward", -apart[name]))[:most]
        shown = [f"{name} ×{n}" if n > 1 else name for name, n in apart.items() if name in kept]
        return [*shown[:-1], f"{shown[-1]}, …"] if len(kept) < len(apart) else shown


@dataclass
class Start:
    """The graph of a function: what it is called, a line about it, blocks that it starts with."""

    name: str
    about: str
    children: list[Block]


@dataclass
class _Merged:
    operator: str
    visits: int = 0
    ends: int = 0
    variants: int = 0
    lines: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    children: dict[str, _Merged] = field(default_factory=dict)

    def waited(self) -> bool:
        return self.waits.total() * 2 >= self.visits


def blocks(traces: list[list[Node]]) -> list[Block]:
    """The blocks that paths start with, the most visited first."""
    top = Block([], 0)
    todo = [(_merge(traces), top)]
    while todo:
        last, parent = todo.pop()
        for node in last.children.values():
            block, end = _run(node)
            if len(last.children) > 1 or last.ends:
                block.line = max(node.lines, key=node.lines.__getitem__, default="")
            parent.children.append(block)
            todo.append((end, block))
    unrolled = [top]
    while unrolled:
        block = unrolled.pop()
        block.children = sorted(map(_roll, block.children), key=lambda child: -child.visits)
        unrolled += block.children
    return top.children


def _merge(traces: list[list[Node]]) -> _Merged:
    """Nodes of one operator behind one node are one, whatever sizes and numbers they have."""
    root = _Merged("")
    for trace in traces:
        made: list[_Merged] = []
        for parent, operator, visits, ends, line, waits in trace:
            siblings = (made[parent] if parent >= 0 else root).children
            node = siblings.setdefault(operator, _Merged(operator.removeprefix("aten::")))
            node.visits, node.ends = node.visits + visits, node.ends + ends
            node.variants += 1
            node.waits.update(waits)
            if line:
                node.lines[line] += visits
            made.append(node)
    return root


def _run(node: _Merged) -> tuple[Block, _Merged]:
    """The block that starts here, and its last node."""
    block = Block([], node.visits)
    while True:
        block.operators.append(node.operator)
        block.waits.update(node.waits)
        block.variants = max(block.variants, node.variants)
        block.ends = node.ends
        if len(node.children) != 1 or node.ends or node.waited():
            return block, node
        (node,) = node.children.values()


def _roll(block: Block) -> Block:
    """The block, and what follows it, as one where those are turns of a loop."""
    for length in range(1, LONGEST_LOOP + 1):
        turn = [block]
        while len(turn) < length and turn[-1].children:
            turn.append(max(turn[-1].children, key=lambda child: child.visits))
        chain = turn[:]
        while following := [c for c in chain[-1].children if c.like(turn[len(chain) % length])]:
            chain.append(following[0])
        if len(turn) == length and len(chain) >= 2 * length:
            return _loop(chain[: len(chain) // length * length], length)
    return block


def _loop(chain: list[Block], length: int) -> Block:
    """The chain as turns of this length; what else followed its blocks leaves the loop."""
    exits = [c for b, after in pairwise(chain) for c in b.children if c is not after]
    return Block(
        [name for block in chain[:length] for name in block.operators],
        chain[0].visits,
        sum(block.ends for block in chain),
        chain[0].line,
        sum((block.waits for block in chain), Counter()),
        max(block.variants for block in chain),
        len(chain) // length,
        _joined([*exits, *chain[-1].children]),
    )


def _joined(exits: list[Block]) -> list[Block]:
    """Blocks alike that nothing follows as one."""
    kept: list[Block] = []
    for block in exits:
        same = [b for b in kept if not (b.children or block.children) and b.like(block)]
        if not same:
            kept.append(block)
            continue
        (first,) = same
        first.visits, first.ends = first.visits + block.visits, first.ends + block.ends
        first.waits.update(block.waits)
        first.variants = max(first.variants, block.variants)
    return kept
