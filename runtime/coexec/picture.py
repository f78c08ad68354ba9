"""Trace graphs as Graphviz text and as SVG, laid out here: they are trees."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from itertools import count
from pathlib import PurePath
from textwrap import wrap

from regraft.runtime.coexec.blocks import Block, Start

MOST, WIDEST = 80, 8  # blocks and paths shown: the most visited
COLUMNS = 38  # characters of a line
GLYPH, LINE, PAD, GAP, DROP = 7.3, 16.0, 9.0, 26.0, 46.0
HEAD, BODY, PLACE, WAIT, END = "head", "body", "place", "wait", "end"
STYLE = """
text { font: 12px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #24303f }
.title { font-size: 17px; font-weight: bold } .about, .place { fill: #66758a }
.head { font-weight: bold } .wait { fill: #7a4a00 } .end { fill: #1d6b43 }
.count { fill: #3d5a80; font-size: 11px } .left { text-anchor: end }
"""


@dataclass
class _Box:
    """A block on the page; x is its middle, width that of all below it, too."""

    lines: list[tuple[str, str]]  # kind and text
    visits: int
    children: list[_Box] = field(default_factory=list)
    folded: bool = False
    x: float = 0.0
    y: float = 0.0
    spread: float = 0.0

    @property
    def width(self) -> float:
        return 2 * PAD + GLYPH * max(len(text) for _, text in self.lines)

    @property
    def height(self) -> float:
        return 2 * PAD + LINE * len(self.lines) - 4

    def all(self) -> Iterator[_Box]:
        todo = [self]
        while todo:
            box = todo.pop()
            yield box
            todo += box.children


def svg(*starts: Start) -> str:
    """A picture of the graphs: the start on top, calls flow down, edges say how often."""
    parts, width, height = [], 0.0, 0.0
    for start in starts:
        text, wide, high = _graph(start)
        parts.append(f'<g transform="translate(0 {height:.0f})">\n{text}\n</g>')
        width, height = max(width, wide), height + high
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">\n<style>{STYLE}</style>\n'
        '<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(parts)
    ) + "\n</svg>\n"


def _graph(start: Start) -> tuple[str, float, float]:
    """One graph, its width and height."""
    root = _boxes(start)
    _place(root)
    boxes = list(root.all())
    width = max(root.spread, 8 * len(start.about), 11 * len(start.name)) + 2 * GAP
    height = max(box.y + box.height for box in boxes) + GAP
    for box in boxes:
        box.x += (width - root.spread) / 2
    most = max(root.visits, 1)
    parts = [_text(GAP, 34, "title", start.name), _text(GAP, 54, "about", start.about)]
    parts += [_edge(box, child, most) for box in boxes for child in box.children]
    parts += [_drawn(box) for box in boxes]
    return "\n".join(parts), width, height


def dot(*starts: Start) -> str:
    """The same for Graphviz."""
    lines = ["digraph coexecution {", "  node [shape=box, fontname=monospace, fontsize=10];"]
    lines.append("  edge [fontname=monospace, fontsize=9];")
    number = count()
    for start in starts:
        boxes = {id(box): (next(number), box) for box in _boxes(start).all()}
        lines.append(f"  subgraph cluster{next(number)} {{")
        lines.append(f"    label={_quoted(f'{start.name}: {start.about}')};")
        for own, box in boxes.values():
            waits = any(kind == WAIT for kind, _ in box.lines)
            style = ', style=filled, fillcolor="#fdeccb"' if waits else ""
            label = _quoted("".join(f"{text}\n" for _, text in box.lines))
            lines.append(f"    n{own} [label={label}{style}];")
            for child in box.children:
                lines.append(f'    n{own} -> n{boxes[id(child)][0]} [label="{child.visits}"];')
        lines.append("  }")
    return "\n".join([*lines, "}"]) + "\n"


def _boxes(start: Start) -> _Box:
    """The most visited blocks, each under the one before it; what is left out says so."""
    visits = sum(block.visits for block in start.children)
    root = _Box([(HEAD, "start")], visits)
    order = count()
    queue = [(-block.visits, next(order), block, root) for block in start.children]
    heapq.heapify(queue)
    rest: dict[int, tuple[_Box, int, int]] = {}
    shown, paths = 0, 1
    while queue:
        _, _, block, parent = heapq.heappop(queue)
        parts = bool(parent.children)
        if shown == MOST or (parts and paths == WIDEST):
            _, left, visits = rest.get(id(parent), (parent, 0, 0))
            rest[id(parent)] = parent, left + 1, visits + block.visits
            continue
        shown, paths = shown + 1, paths + parts
        box = _Box(list(_lines(block)), block.visits)
        parent.children.append(box)
        for child in block.children:
            heapq.heappush(queue, (-child.visits, next(order), child, box))
    for parent, left, visits in rest.values():
        more = f"… {left} more" if parent.children else "…"
        parent.children.append(_Box([(PLACE, more)], visits, folded=True))
    return root


def _lines(block: Block) -> Iterator[tuple[str, str]]:
    if block.line:
        yield PLACE, f"at {_short(block.line)}"
    count = len(block.operators)
    head = f"{count} operator{'s' * (count > 1)}"
    if block.turns > 1:
        head = f"{block.turns} turns of {head}"
    yield HEAD, head + (f", {block.variants} variants" if block.variants > 1 else "")
    for line in wrap(", ".join(name.replace(" ", "\u00a0") for name in block.names()), COLUMNS):
        yield BODY, line
    for line, waits in block.waits.most_common(3):
        yield WAIT, f"Python waits {waits}× at {_short(line)}"
    if block.ends:
        yield END, f"ends here {block.ends}×"


def _short(line: str) -> str:
    """Folder, file and line number."""
    return "/".join(PurePath(line).parts[-2:])


def _place(root: _Box) -> None:
    """Children side by side below their parent, which is in the middle above them."""
    boxes = list(root.all())
    for box in reversed(boxes):
        below = sum(child.spread for child in box.children) + GAP * (len(box.children) - 1)
        box.spread = max(box.width, below)
    root.x, root.y = root.spread / 2, 76.0
    for box in boxes:
        below = sum(child.spread for child in box.children) + GAP * (len(box.children) - 1)
        left = box.x - below / 2
        for child in box.children:
            child.x, child.y = left + child.spread / 2, box.y + box.height + DROP
            left += child.spread + GAP


def _edge(box: _Box, child: _Box, most: int) -> str:
    top, bottom = box.y + box.height, child.y
    middle = (top + bottom) / 2
    share = child.visits / most
    kind = "count" if child.x >= box.x else "count left"
    curve = f"M{box.x:.1f} {top:.1f}C{box.x:.1f} {middle:.1f} {child.x:.1f} {middle:.1f} "
    return (
        f'<path d="{curve}{child.x:.1f} {bottom:.1f}" fill="none" stroke="#9db2cc" '
        f'stroke-width="{1 + 5 * share:.1f}"/>'
        + _text(child.x + (6 if child.x >= box.x else -6), bottom - 6, kind, f"{child.visits}×")
    )


def _drawn(box: _Box) -> str:
    left, width = box.x - box.width / 2, box.width
    waits = sum(kind == WAIT for kind, _ in box.lines)
    dashes = ' stroke-dasharray="4 3"' if box.folded else ""
    parts = [
        f'<rect x="{left:.1f}" y="{box.y:.1f}" width="{width:.1f}" height="{box.height:.1f}" '
        f'rx="6" fill="#f4f7fb" stroke="#6d87a8"{dashes}/>'
    ]
    if waits:
        first = next(i for i, (kind, _) in enumerate(box.lines) if kind == WAIT)
        parts.append(
            f'<rect x="{left + 1:.1f}" y="{box.y + PAD + LINE * first - 3:.1f}" '
            f'width="{width - 2:.1f}" height="{LINE * waits + 2:.1f}" fill="#fdeccb"/>'
        )
    for number, (kind, text) in enumerate(box.lines):
        parts.append(_text(left + PAD, box.y + PAD + LINE * number + 9, kind, text))
    return "".join(parts)


def _text(x: float, y: float, kind: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


def _quoted(text: str) -> str:
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\l")
    return f'"{text}"'
