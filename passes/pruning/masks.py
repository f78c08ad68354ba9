"""What was kept of each block, as a file, a picture and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regraft.passes.pruning.blocks import Block
from regraft.passes.pruning.slicing import Cut
from regraft.program import Program, RegraftError
from regraft.program.folders import written_whole

KEY = "regraft masks"


@dataclass(frozen=True)
class Layout:
    """A block before it was cut: where it was, its kind, units, and heads or filters a unit."""

    name: str
    kind: str
    units: int
    parts: int


@dataclass(frozen=True, eq=False)
class Masks:
    """Cuts of a program's blocks. tokens: the length of sequences they were chosen for; share: what
    is left of the multiplications of all blocks; seconds: what each stage took."""

    layouts: tuple[Layout, ...]
    cuts: tuple[Cut, ...]
    tokens: float
    share: float
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, blocks: Sequence[Block], cuts: Sequence[Cut], tokens: float, **more: Any) -> Masks:
        layouts = tuple(Layout(b.name, b.kind, b.units, b.parts) for b in blocks)
        left = sum(b.cost(len(c.kept), tokens) for b, c in zip(blocks, cuts, strict=True))
        share = left / sum(block.cost(block.units, tokens) for block in blocks)
        return cls(layouts, tuple(cuts), tokens, share, **more)

    def save(self, path: str | Path) -> None:
        """Write what ``Prune(masks=path)`` reads."""
        tensors = {
            f"{index}.{name}": value.clone(memory_format=torch.contiguous_format)
            for index, one in enumerate(self.cuts)
            for name, value in vars(one).items()
            if value is not None
        }
        head = {
            "layouts": [asdict(layout) for layout in self.layouts],
            "tokens": self.tokens,
            "share": self.share,
        }
        try:
            with written_whole(Path(path)) as partial:
                save_file(tensors, partial, metadata={KEY: json.dumps(head)})
        except (OSError, SafetensorError) as error:
            raise RegraftError(f"the masks cannot be written to {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """The masks that ``save`` wrote; RegraftError where the file is damaged."""
        try:
            with safe_open(path, "pt") as file:
                head = json.loads((file.metadata() or {})[KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            layouts = tuple(Layout(**layout) for layout in head["layouts"])
            kinds = ("kept", "scale", "weight", "bias")
            cuts = tuple(
                Cut(**{k: tensors[f"{i}.{k}"] for k in kinds if f"{i}.{k}" in tensors})
                for i in range(len(layouts))
            )
            return cls(layouts, cuts, float(head["tokens"]), float(head["share"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RegraftError(f"{path} holds no sound masks: {error}") from error

    def fit(self, blocks: Sequence[Block]) -> None:
        """RegraftError where these are not the masks of these blocks."""
        if len(blocks) != len(self.layouts):
            raise RegraftError(f"masks of {len(self.layouts)} blocks, the model has {len(blocks)}")
        for block, layout, one in zip(blocks, self.layouts, self.cuts, strict=True):
            found = (block.kind, block.units, block.parts)
            features = block.output.args[1].meta["val"].shape[0]
            count = len(one.kept)
            wanted: dict[str, tuple[int, ...]] = {
                "scale": (count * block.parts,),
                "weight": (features, count * block.width),
                "bias": (features,),
            }
            sound = one.kept.dtype == torch.int64 and one.kept.dim() == 1
            sound = sound and torch.equal(one.kept, one.kept.unique())
            sound = sound and (not count or (one.kept[0] >= 0 and one.kept[-1] < block.units))
            sound = sound and _balanced(one.kept, block)
            shapes = {k: getattr(one, k) for k in wanted if getattr(one, k) is not None}
            sound = sound and all(x.shape == wanted[k] for k, x in shapes.items())
            if found != (layout.kind, layout.units, layout.parts) or not sound:
                raise RegraftError(f"the masks do not fit {block.name}: {found[1]} {found[0]}")

    def rows(self) -> list[tuple[int | None, int | None]]:
        """(heads, filters) of each layer as indices of blocks, in graph order."""
        found: list[tuple[int | None, int | None]] = []
        for index, layout in enumerate(self.layouts):
            if layout.kind == "filters" and found and found[-1][1] is None:
                found[-1] = (found[-1][0], index)
            else:
                found.append((None, index) if layout.kind == "filters" else (index, None))
        return found

    def scales(self, index: int) -> Tensor:
        """A mask a head or filter, 0 where it was cut [units * parts]."""
        layout, one = self.layouts[index], self.cuts[index]
        made = torch.zeros(layout.units, layout.parts)
        kept = torch.ones(len(one.kept) * layout.parts) if one.scale is None else one.scale
        made[one.kept] = kept.view(-1, layout.parts)
        return made.flatten()

    def picture(self) -> str:
        """A line a layer: heads kept and cut, the share of filters kept."""
        lines = [f"{self.share:.1%} of multiplications at {self.tokens:.0f} tokens"]
        for number, (heads, filters) in enumerate(self.rows()):
            line = f"layer {number:2d}"
            if heads is not None:
                line += "  heads " + "".join("█" if m else "·" for m in self.scales(heads))
            if filters is not None:
                kept, whole = len(self.cuts[filters].kept), self.layouts[filters].units
                bar = "█" * round(20 * kept / whole)
                line += f"  filters {bar:·<20} {kept}/{whole}"
            lines.append(line)
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """An image: masks of heads by layer, and filters kept by layer. Needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise RegraftError("plots need matplotlib: pip install 'regraft[plots]'") from error
        rows = self.rows()
        wide = max((len(self.scales(h)) for h, _ in rows if h is not None), default=1)
        image = torch.full((len(rows), wide), torch.nan)
        for row, (heads, _) in enumerate(rows):
            if heads is not None:
                image[row, : len(self.scales(heads))] = self.scales(heads)
        figure = Figure(figsize=(8, 1.5 + 0.25 * len(rows)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        shown = left.imshow(image.tolist(), aspect="auto", vmin=0, cmap="viridis")
        figure.colorbar(shown, ax=left, label="mask")
        left.set(xlabel="head", ylabel="layer", title=f"{self.share:.0%} of multiplications")
        kept = [0 if f is None else len(self.cuts[f].kept) for _, f in rows]
        whole = [0 if f is None else self.layouts[f].units for _, f in rows]
        right.barh(range(len(rows)), whole, color="lightgray")
        right.barh(range(len(rows)), kept)
        right.set(xlabel="filters kept")
        figure.savefig(path, dpi=120)


def _balanced(kept: Tensor, block: Block) -> bool:
    """Whether as many units are kept of each group."""
    counts = torch.bincount(kept // (block.units // block.groups), minlength=block.groups)
    return counts.unique().numel() == 1


def save_masks(program: Program, path: str | Path) -> None:
    """Write what Prune chose for a program; RegraftError where nothing was pruned."""
    if "masks" not in program.metadata:
        raise RegraftError("this program was not pruned here: compile with Prune")
    program.metadata["masks"].save(path)
