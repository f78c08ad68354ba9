"""A compiled transformers model without generation: encoders and their heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from regraft.program import Program, RegraftError, Report
from regraft.runtime.causal_lm import Compiled
from regraft.runtime.module import CompiledModule


class CompiledEncoder(CompiledModule):
    """Called as the original model; returns its own ModelOutput.

    config, name_or_path: the model's own. attention_mask and token_type_ids may be left out:
    all ones and all zeros.
    """

    def __init__(self, program: Program, report: Report, model: Any) -> None:
        super().__init__(program, report)
        self.config: PretrainedConfig = model.config
        self.dtype = model.dtype
        self.name_or_path = getattr(model, "name_or_path", "")

    def __call__(self, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        given = dict(zip(self.program.metadata["forward"], args, strict=False)) | kwargs
        ids = given.get("input_ids")
        if torch.is_tensor(ids):
            self._check(ids)
            for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
                if name in self.program.metadata["arguments"] and given.get(name) is None:
                    kwargs[name] = torch.full_like(ids, value)
        if "use_cache" in self.program.metadata["arguments"]:
            kwargs.setdefault("use_cache", False)
        try:
            output = super().__call__(*args, **kwargs)
        except IndexError as error:
            raise RegraftError(
                f"a token id is beyond the vocabulary of {self.config.vocab_size}, or a sequence "
                "beyond the model's positions"
            ) from error
        keep = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if keep or not hasattr(output, "to_tuple") else output.to_tuple()

    to: Any = Compiled.to

    def _check(self, ids: Tensor) -> None:
        if not ids.numel():
            raise RegraftError("input_ids is empty: give at least one token")
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit and ids.shape[-1] > limit:
            raise RegraftError(f"{ids.shape[-1]} tokens are beyond the model's limit of {limit}")
