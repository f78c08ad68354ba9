"""Quantised KV cache: packed codes between an exact sink and an exact tail."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from regraft.kernels.kvquant.codebook import BITS
from regraft.passes.base import Context, Pass, PassResult
from regraft.passes.budget import Option, cheapest, shares, token_bits
from regraft.passes.calibrate import KINDS, Fit, Samples, collect, fit, pieces, spread, vocabulary
from regraft.program import LayerState, Program, RegraftError
from regraft.program.calibration import load_calibration

CODEBOOKS = ("nuq", "lloyd_max", "normal_float", "uniform", "rotated")
_CAUSAL = {"ids", "mask", "positions", "cache"}
EXACT = 16


@dataclass(frozen=True)
class KVQuant(Pass):
    """dense cache -> sink (exact) | body (codes) | tail (exact)     lossy: half a code's step

    Keys are coded per channel before rotation, values per token over all heads. bits: 2, 3, 4
    or 8 for all, {"key": 3, "value": 2}, or a budget of effective bits such as 3.35, spent where
    it lowers the expected loss most; layers: {index: {"key": 4}} for single ones, of 16 bits for
    keys and values where a layer stays dense. outliers: the share of elements kept beside their
    codes.

    Codebook "nuq" is fitted, with the ranges of keys, to the calibration batches of ``compile``,
    or read from the file ``calibration`` that ``save_calibration`` wrote. Without either, and for
    the codebooks "lloyd_max", "normal_float" and "uniform", keys have the range of each ``group``
    of tokens, and values alone have outliers. "rotated" is "lloyd_max" for rotated keys and values
    that a Hadamard matrix has spread over the channels of a head, without outliers. qnorm: codes
    read with the spread of the data; by default those of 2 bits and, without a budget, of 4.
    Source: KVQuant (arXiv 2401.18079), KIVI (arXiv 2402.02750), QuaRot (arXiv 2404.00456).
    """

    bits: int | float | Mapping[str, int] = 4
    layers: Mapping[int, Mapping[str, int]] | None = None
    outliers: float = 0.01
    codebook: str = "nuq"
    sink: int = 4
    tail: int = 32
    group: int = 64
    qnorm: bool | None = None
    calibration: str | None = None
    tolerance: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        every = [self.layer_bits(index) for index in (-1, *(self.layers or ()))]
        if any(set(bits.values()) != {EXACT} and set(bits.values()) - set(BITS) for bits in every):
            raise RegraftError(
                f"KVQuant(bits={self.bits}): bits must be 2, 3, 4 or 8, or {EXACT} for keys and "
                "values of a layer"
            )
        if any(set(asked) != set(KINDS) for asked in every):
            raise RegraftError('KVQuant: bits are given for "key" and "value" alone')
        if self.codebook not in CODEBOOKS:
            known = ", ".join(CODEBOOKS)
            raise RegraftError(f"KVQuant(codebook={self.codebook!r}): one of {known}")
        if self.sink < 0 or self.tail < 1 or self.group < 32 or self.group % 32:
            raise RegraftError("KVQuant: sink >= 0, tail >= 1, group a positive multiple of 32")
        if not 0 <= self.outliers <= 1:
            raise RegraftError("KVQuant: outliers is a share between 0 and 1")
        if self.codebook != "nuq" and (self.budget or self.calibration):
            raise RegraftError("KVQuant: a budget of bits and a calibration need the codebook nuq")

    @property
    def budget(self) -> float | None:
        """The effective bits to spend, where ``bits`` is that."""
        return self.bits if isinstance(self.bits, float) else None

    def layer_bits(self, index: int) -> dict[str, int]:
        """The bits asked for the keys and values of a layer."""
        asked: Mapping[str, int]
        if isinstance(self.bits, Mapping):
            asked = {"key": 4, "value": 4, **self.bits}
        else:
            asked = dict.fromkeys(KINDS, 4 if isinstance(self.bits, float) else self.bits)
        return {**asked, **(self.layers or {}).get(index, {})}

    def is_exact(self, index: int) -> bool:
        return set(self.layer_bits(index).values()) == {EXACT}

    def identity(self) -> str:
        if self.calibration is None:
            return repr(self)
        try:
            content = Path(self.calibration).read_bytes()
        except OSError as error:
            raise RegraftError(f"{self.calibration} cannot be read: {error}") from error
        return f"{self} {hashlib.sha256(content).hexdigest()}"

    def apply(self, program: Program, context: Context) -> PassResult:
        target = torch.ops.regraft.cached_attention.default
        nodes = program.graph.find_nodes(op="call_function", target=target)
        if reason := _why_not(program, nodes):
            return PassResult(0, (reason,))
        if extra := set(self.layers or ()) - set(range(len(nodes))):
            raise RegraftError(f"KVQuant: there is no layer {min(extra)}, only {len(nodes)}")
        note = ""
        if self.calibration is not None:
            layers = self._loaded(nodes)
        elif self.codebook != "nuq":
            layers = [self._state(index) for index in range(len(nodes))]
        elif context.calibration and {spec.role for spec in program.inputs} <= _CAUSAL:
            layers = self._calibrated(program, nodes, context)
        else:
            note = "none was given" if not context.calibration else "decoders alone can use it"
            note += ": codes are data-free (lloyd_max)"
            if self.budget is not None:
                raise RegraftError(f"KVQuant(bits={self.bits}) needs calibration; {note}")
            layers = [self._state(index) for index in range(len(nodes))]
        program.cache = replace(program.cache, layers=tuple(layers))
        return PassResult(len(nodes), (("calibration", note),) if note else ())

    def _state(self, index: int, fits: Mapping[str, Fit] | None = None) -> LayerState:
        """The state of a layer, calibrated or data-free."""
        if self.is_exact(index):
            return LayerState()
        settings: dict[str, Any] = {}
        tensors: dict[str, torch.Tensor] = {}
        for kind, bits in self.layer_bits(index).items():
            found = fits[kind] if fits else None
            free = 0.0 if kind == "key" or self.codebook == "rotated" else self.outliers
            settings[f"{kind}_bits"] = found.book.bits if found else bits
            settings[f"{kind}_outliers"] = found.outliers if found else free
            if found:
                tensors |= {f"{kind}_{name}": x for name, x in found.tensors().items()}
        book = "lloyd_max" if self.codebook == "nuq" and not fits else self.codebook
        settings |= {"codebook": book, "sink": self.sink, "tail": self.tail, "group": self.group}
        return LayerState("kvquant", tuple(settings.items()), tensors)

    def _calibrated(
        self, program: Program, nodes: Sequence[fx.Node], context: Context
    ) -> list[LayerState]:
        batches = pieces(context.calibration, vocabulary(program))
        samples = collect(program, nodes, batches, self.sink, context.tell)
        options: list[list[Option]] = []
        coded = [index for index in range(len(samples)) if not self.is_exact(index)]
        for index in coded:
            layer = samples[index]
            context.tell(f"codebooks {index + 1} of {len(samples)}")
            for kind, given in layer.items():
                heads, size = given.x.shape[1], given.x.shape[3]
                choices = [(self.layer_bits(index)[kind], self.outliers)]
                if self.budget is not None and kind not in (self.layers or {}).get(index, {}):
                    choices = [(bits, o) for bits in BITS[:3] for o in shares(self.outliers)]
                made = []
                for bits, outliers in choices:
                    qnorm = self.qnorm
                    if qnorm is None:
                        qnorm = spread(bits, weighed=self.budget is not None)
                    found = fit(kind, given, bits, outliers, qnorm)
                    cost = token_bits(kind, bits, outliers, heads, size)
                    made.append(Option(cost, found.error, found))
                options.append(made)
        found = self._within_budget(options, [samples[index] for index in coded])
        fits = [option.choice for option in found]
        pairs = zip(fits[::2], fits[1::2], strict=True)
        known = {
            i: dict(zip(KINDS, pair, strict=True)) for i, pair in zip(coded, pairs, strict=True)
        }
        return [self._state(index, known.get(index)) for index in range(len(samples))]

    def _within_budget(
        self, options: Sequence[Sequence[Option]], samples: Sequence[Mapping[str, Samples]]
    ) -> list[Option]:
        """One option of each tensor."""
        if self.budget is None:
            return [only for (only,) in options]
        elements = sum(s.x.shape[1] * s.x.shape[3] for layer in samples for s in layer.values())
        try:
            return cheapest(options, self.budget * elements)
        except ValueError as error:
            raise RegraftError(f"KVQuant(bits={self.bits}) is too little: {error}") from error

    def _loaded(self, nodes: Sequence[fx.Node]) -> list[LayerState]:
        """The states of the calibration file, with this pass's own sink and tail."""
        layers = []
        for index, (node, state) in enumerate(zip(nodes, self._same_number(nodes), strict=True)):
            if self.is_exact(index):
                layers.append(LayerState())
                continue
            settings = dict(state.settings)
            if not settings:
                raise RegraftError(f"{self.calibration}: layer {index} was not calibrated")
            key = node.args[1].meta["val"].shape
            if list(state.tensors["key_scale"].shape) != [1, key[1], 1, key[3]]:
                raise RegraftError(f"{self.calibration}: layer {index} has other heads")
            asked = self.layer_bits(index)
            found = {kind: settings[f"{kind}_bits"] for kind in KINDS}
            if self.budget is None and found != asked:
                raise RegraftError(
                    f"{self.calibration}: layer {index} was calibrated for {found} bits, "
                    f"asked for are {asked}"
                )
            settings |= {"sink": self.sink, "tail": self.tail, "group": self.group}
            layers.append(replace(state, settings=tuple(settings.items())))
        return layers

    def _same_number(self, nodes: Sequence[fx.Node]) -> Sequence[LayerState]:
        states = load_calibration(str(self.calibration))
        if len(states) != len(nodes):
            raise RegraftError(
                f"{self.calibration} has {len(states)} layers, the model {len(nodes)}"
            )
        return states


def _why_not(program: Program, nodes: Sequence[fx.Node]) -> tuple[str, str] | None:
    if len(nodes) != len(program.cache.layers):
        missing = len(program.cache.layers) - len(nodes)
        return "cache", f"{missing} attention layers were not raised (see RaiseAttention)"
    for node in nodes:
        for kind, state in zip(KINDS, node.args[1:3], strict=True):
            if (size := state.meta["val"].shape[-1]) % 8:
                return node.name, f"{kind} size {size} is not a multiple of 8"
    return None
