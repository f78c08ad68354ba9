"""A compiled ONNX model: called by the names of the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regraft.runtime.module import CompiledModule


class CompiledOnnx(CompiledModule):
    """What ``regraft.compile`` returns for an ONNX model.

    Call it with the graph's inputs in order, by keyword, or with one dict by name; the result is
    the output, or a tuple of several.
    """

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = list(args)
        if len(given) == 1 and isinstance(given[0], Mapping) and not kwargs:
            given, kwargs = [], dict(given[0])
        whole = self.program.metadata.get("whole")
        return whole(*given, **kwargs) if whole else super().__call__(*given, **kwargs)
