"""A compiled ONNX model: called by the names of the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regraft.program import Program, Report
from regraft.runtime.module import CompiledModule


class CompiledOnnx(CompiledModule):
    """What ``regraft.compile`` returns for an ONNX model.

    Call it with the graph's inputs in order, by keyword, or with one dict by name; the result is
    the output, or a tuple of several. program.metadata["python"] says why a model whose shapes
    or control flow depend on data is not traced.
    """

    def __init__(self, program: Program, report: Report) -> None:
        self.whole = program.metadata.get("whole")
        if self.whole is None:
            super().__init__(program, report)
        else:
            self.program, self.report, self.regions = program, report, []
            self.device = torch.device(program.metadata["device"])

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = next(iter(args), None)
        if isinstance(first, Mapping) and len(args) == 1 and not kwargs:
            return self(**first)
        call = super().__call__ if self.whole is None else self.whole
        return call(*args, **kwargs)
