"""The files of an export: written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from regraft.program import RegraftError
from regraft.program.folders import folder_written_whole, is_empty

MODEL, DATA = "model.onnx", "model.onnx.data"
OPSETS = range(18, 25)


@dataclass(frozen=True)
class Exported:
    """What an export wrote: bytes of the files and of the weights, for each check the largest
    difference from the compiled program over the largest output, and how many of onnxruntime's own
    operators were used."""

    folder: Path
    file_bytes: int
    weight_bytes: int
    errors: dict[str, float]
    fused: dict[str, int]
    outputs: str = "logits"

    @classmethod
    def of(
        cls, folder: Path, model: ir.Model, errors: dict[str, float], fused: dict[str, int],
        outputs: str = "logits",
    ) -> Exported:  # fmt: skip
        """What lies in the folder."""
        weights = sum(w.const_value.nbytes for w in model.graph.initializers.values())  # type: ignore
        paths = [folder / name for name in (MODEL, DATA)]
        size = sum(path.stat().st_size for path in paths if path.exists())
        return cls(folder, size, weights, errors, fused, outputs)

    def __str__(self) -> str:
        checks = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        used = "".join(f"; {count} {name}" for name, count in self.fused.items())
        size = f"{self.file_bytes / 2**20:.0f} MiB"
        return f"{self.folder}: {size}{used}; error over {self.outputs}: {checks}"


def checked_target(folder: str | Path, opset: int, force: bool) -> Path:
    """The folder to write; RegraftError where that cannot be asked for."""
    folder = Path(folder).absolute()
    if opset not in OPSETS:
        raise RegraftError(f"opset {opset}: {OPSETS[0]} to {OPSETS[-1]} can be written")
    if folder.exists() and not is_empty(folder) and not force:
        raise RegraftError(f"{folder} exists: name another folder, or ask for --force")
    if folder.exists() and not folder.is_dir():
        raise RegraftError(f"{folder} is a file: name a folder")
    return folder


@contextmanager
def written(folder: Path, model: ir.Model) -> Iterator[Path]:
    """A new folder with the model in it, which takes the place of ``folder`` when the block ends
    well. RegraftError where it cannot be written."""
    try:
        with folder_written_whole(folder) as made:
            ir.save(model, made / MODEL, external_data=DATA, size_threshold_bytes=1024)
            onnx.checker.check_model(str(made / MODEL))
            yield made
    except OSError as error:
        raise RegraftError(f"the export cannot be written to {folder}: {error}") from error
