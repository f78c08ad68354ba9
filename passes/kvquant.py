"""Quantised KV cache: packed codes between an exact sink and an exact tail."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from regraft.kernels.kvquant.codebook import BITS
from regraft.passes.base import Context, Pass, PassResult
from regraft.program import LayerState, Program, RegraftError

CODEBOOKS = ("lloyd_max", "normal_float")


@dataclass(frozen=True)
class KVQuant(Pass):
    """dense cache -> sink (exact) | body (codes) | tail (exact)     lossy: half a code's step

    Keys are coded per channel before rotation over ``group`` tokens, values per token over all
    heads, both with a codebook of 2**bits levels between the minimum and the maximum: "lloyd_max",
    those of least error for a normal, "normal_float" (QLoRA's NF4), or a uniform grid at 8 bits.
    Data-free. Source: KVQuant (arXiv 2401.18079), KIVI (arXiv 2402.02750).
    """

    bits: int = 4
    sink: int = 4
    tail: int = 32
    group: int = 64
    levels: str = "lloyd_max"
    tolerance: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise RegraftError(f"KVQuant(bits={self.bits}): bits must be 2, 3, 4 or 8")
        if self.sink < 0 or self.tail < 1 or self.group < 8 or self.group % 8:
            raise RegraftError("KVQuant: sink >= 0, tail >= 1, group a positive multiple of 8")
        if self.levels not in CODEBOOKS:
            raise RegraftError(f"KVQuant(levels={self.levels!r}): one of {', '.join(CODEBOOKS)}")

    def apply(self, program: Program, context: Context) -> PassResult:
        target = torch.ops.regraft.cached_attention.default
        nodes = program.graph.find_nodes(op="call_function", target=target)
        raised = len(nodes)
        if raised != len(program.cache.layers):
            missing = len(program.cache.layers) - raised
            reason = f"{missing} attention layers were not raised (see RaiseAttention)"
            return PassResult(0, (("cache", reason),))
        for node in nodes:
            for kind, state in zip(("key", "value"), node.args[1:3], strict=True):
                if (size := state.meta["val"].shape[-1]) % 8:
                    reason = f"{kind} size {size} is not a multiple of 8"
                    return PassResult(0, ((node.name, reason),))
        settings = tuple(self.settings().items())
        state = replace(LayerState(), format="kvquant", settings=settings)
        program.cache = replace(program.cache, layers=(state,) * raised)
        return PassResult(raised)
