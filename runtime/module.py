"""A compiled torch module: the signature and the outputs of the module it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from regraft.program import Program, RegraftError, Report, TensorSpec
from regraft.runtime.lower import lower_stateless


class CompiledModule:
    """What ``regraft.compile`` returns for a module: call it as the module was called.

    program: the transformed graph; report: what each pass did.
    """

    def __init__(self, program: Program, report: Report) -> None:
        self.program, self.report = program, report
        self.device = torch.device(program.metadata["device"])
        self._run, self.regions = lower_stateless(program)

    def __repr__(self) -> str:
        inputs = ", ".join(f"{spec.name}{list(spec.shape)}" for spec in self.program.inputs)
        return f"{type(self).__name__}({inputs}; {len(self.program.graph.nodes)} nodes)"

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs, in the module's structure, for inputs that fit its signature."""
        results = self._run(*self._flat(args, kwargs))
        tensors = iter(results)
        metadata = self.program.metadata
        leaves = [next(tensors) if r is None else r[0] for r in metadata["results"]]
        return pytree.tree_unflatten(leaves, metadata["out_spec"])

    def save(self, folder: Any) -> None:
        raise RegraftError(
            f"{type(self).__name__} cannot be saved yet: artefacts hold causal language models "
            "alone; compile it again where it runs"
        )

    def export_onnx(
        self,
        folder: str | Path,
        *,
        opset: int = 21,
        functions: bool = True,
        tokenizer: Any = None,
        force: bool = False,
    ) -> Any:
        """Write model.onnx, its weights beside it, and the model's configuration and tokenizer,
        where there are any; inputs, outputs and dynamic sizes by the program's names
        (input_ids, attention_mask, last_hidden_state or logits of an encoder).

        What onnxruntime computes is compared with this program first, on the examples and on
        other sizes: returns the sizes and errors. RegraftError where an operator has no ONNX
        form, where the comparison fails, and where the folder exists, unless force.
        """
        from regraft.frontends.export import export_module

        return export_module(
            self, folder, opset=opset, functions=functions, tokenizer=tokenizer, force=force
        )

    def eval(self) -> CompiledModule:
        return self

    def _flat(self, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
        metadata = self.program.metadata
        names, wanted, forward = metadata["arguments"], metadata["in_spec"], metadata["forward"]
        if len(args) > len(forward):
            raise RegraftError(f"{len(args)} positional inputs, the module takes {forward}")
        given = dict(zip(forward, args, strict=False))
        if twice := [name for name in kwargs if name in given]:
            raise RegraftError(f"input {twice[0]} was given twice")
        given |= kwargs
        for name in [name for name in given if name not in names]:
            if given[name] is not None:
                raise RegraftError(f"unknown input {name}: the module was compiled with {names}")
        if missing := [name for name in names if name not in given]:
            raise RegraftError(f"input {missing[0]} is missing: the module was compiled with it")
        args_spec, kwargs_spec = wanted.children()
        leaves: list[Any] = []
        for name, want in zip(names, [*args_spec.children(), *kwargs_spec.children()], strict=True):
            flat, spec = pytree.tree_flatten(given[name])
            if spec != want:
                raise RegraftError(f"input {name} is {_structure(spec)}, wanted {_structure(want)}")
            leaves += flat
        constants = metadata["constants"]
        for index, value in constants.items():
            if type(leaves[index]) is not type(value) or leaves[index] != value:
                raise RegraftError(
                    f"an input is {leaves[index]!r}, compiled for {value!r}: "
                    "compile again for another value"
                )
        tensors = [leaf for i, leaf in enumerate(leaves) if i not in constants]
        check_inputs(self.program, tensors, self.device)
        return tensors


def check_inputs(program: Program, tensors: list[Any], device: torch.device) -> None:
    """Raise for the first input whose type, rank, dtype, device or size does not fit."""
    sizes: dict[str, tuple[int, str]] = {}
    ranges = program.metadata.get("ranges", {})
    for spec, value in zip(program.inputs, tensors, strict=True):
        if not torch.is_tensor(value):
            raise RegraftError(f"input {spec.name} is a {type(value).__name__}, wanted a tensor")
        if value.dtype != spec.dtype:
            raise RegraftError(f"input {spec.name} is {value.dtype}, wanted {spec.dtype}")
        if value.device != device:
            raise RegraftError(f"input {spec.name} is on {value.device}, wanted {device}")
        if value.dim() != len(spec.shape):
            raise RegraftError(f"input {spec.name} is {list(value.shape)}, wanted {_shown(spec)}")
        for dim, (size, want) in enumerate(zip(value.shape, spec.shape, strict=True)):
            if isinstance(want, int):
                if size != want:
                    raise RegraftError(
                        f"input {spec.name} has size {size} in dimension {dim}, wanted {want}"
                    )
                continue
            known, where = sizes.setdefault(want, (size, spec.name))
            if size != known:
                raise RegraftError(
                    f"input {spec.name} has size {size} in dimension {dim}, wanted {want} = "
                    f"{known} as in {where}"
                )
            low, high = ranges.get(want, (0, None))
            if size < low or (high is not None and size > high):
                raise RegraftError(
                    f"input {spec.name} has size {size} in dimension {dim}, wanted {want} from "
                    f"{low} to {'any' if high is None else high}"
                )


def _structure(spec: pytree.TreeSpec) -> str:
    return " ".join(str(spec).replace("TreeSpec", "").split())


def _shown(spec: TensorSpec) -> str:
    return f"[{', '.join(map(str, spec.shape))}]"
