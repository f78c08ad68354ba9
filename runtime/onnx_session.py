"""An exported module or encoder, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from regraft.program import RegraftError


class OnnxSession:
    """What ``regraft.load`` returns for an exported module: call it with the model's inputs in
    order or by name. The result is the output, or a ModelOutput of several by name."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs = {value.name: value.type for value in session.get_inputs()}
        self.outputs = [value.name for value in session.get_outputs()]
        self.device = torch.device("cpu")

    @classmethod
    def open(cls, path: Path, exact: bool = False) -> OnnxSession:
        """RegraftError where onnxruntime refuses the file; exact: see ``open_session``."""
        return cls(open_session(path, exact))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.inputs)}; onnxruntime)"

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Any:
        names = list(self.inputs)
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(args) > len(names) or (unknown := [n for n in given if n not in self.inputs]):
            extra = "too many inputs" if len(args) > len(names) else f"unknown input {unknown[0]}"
            raise RegraftError(f"{extra}: the model takes {names}")
        ids = given.get("input_ids")
        if torch.is_tensor(ids):
            for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
                if name in self.inputs and given.get(name) is None:
                    given[name] = torch.full_like(ids, value)
        if missing := [name for name in names if given.get(name) is None]:
            raise RegraftError(f"input {missing[0]} is missing: the model takes {names}")
        results = self.run([given[name] for name in names])
        if self.outputs == ["output"]:
            return results[0]
        if all(name.startswith("output_") for name in self.outputs):
            return tuple(results)
        return ModelOutput(zip(self.outputs, results, strict=True))

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs in order for the inputs in order."""
        feeds = {n: x.contiguous().numpy() for n, x in zip(self.inputs, inputs, strict=True)}
        try:
            results = self.session.run(None, feeds)
        except Exception as error:
            raise RegraftError(f"onnxruntime: {str(error).splitlines()[0]}") from error
        return [torch.from_numpy(value) for value in results]


def open_session(path: Path, exact: bool = False) -> Any:
    """onnxruntime's session of a file; RegraftError where it refuses it. exact: activations that
    meet packed weights are not rounded, as they are to 8 bits by default."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        first = str(error).splitlines()[0]
        raise RegraftError(f"onnxruntime refuses {path.name}: {first}") from error
