"""The contract of a pass, and the one place that runs, checks, times and reports passes."""

from __future__ import annotations

import difflib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from regraft.kernels import ops  # noqa: F401  registers the regraft:: operators
from regraft.program import Program, RegraftError, Report, Row
from regraft.program.program import tracing

ROUNDINGS = 16
"""By how many roundings of half precision an exact pass may change outputs."""
registry: dict[str, type[Pass]] = {}


@dataclass(frozen=True)
class PassResult:
    """How often the pass matched, (where, reason) of each place it left alone, and what else the
    report shows."""

    matches: int
    skipped: tuple[tuple[str, str], ...] = ()
    picture: str = ""


@dataclass
class Context:
    """What passes share: the user's calibration batches, and whom to tell of progress."""

    calibration: Sequence[Any] = ()
    tell: Callable[[str], None] = lambda what: None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass(ABC):
    """A frozen dataclass of settings with one method that rewrites a program in place."""

    tolerance: ClassVar[float | None] = 1e-5
    """Largest change of the outputs allowed, as a share of their scale; None: not measured."""
    reads_weights: ClassVar[bool] = False
    """Whether what it does depends on the values of weights: no program of it is kept."""

    def __init_subclass__(cls) -> None:
        registry[cls.__name__] = cls

    @abstractmethod
    def apply(self, program: Program, context: Context) -> PassResult: ...

    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def identity(self) -> str:
        """All that what the pass does depends on, besides the program."""
        return repr(self)


def nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.0)
    return f"did you mean {close[0]!r}?" if close else ""


def pass_named(name: str, settings: dict[str, Any] | None = None) -> Pass:
    """The pass of this class name with these settings; unknown names give the nearest."""
    if name not in registry:
        raise RegraftError(f"unknown pass {name!r}: {nearest(name, sorted(registry))}")
    known = [f.name for f in fields(registry[name])]
    for key in settings or {}:
        if key not in known:
            raise RegraftError(f"{name} has no setting {key!r}: {nearest(key, known)}")
    return registry[name](**(settings or {}))


def run(
    program: Program,
    passes: Sequence[Pass],
    context: Context,
    *,
    required: Sequence[Pass] = (),
    dump_dir: str | Path | None = None,
) -> Report:
    """Apply passes in order, in place. Each is verified, timed and its error measured.

    A pass applies to the program and to its prefill; the report tells of the former. What follows a
    lossy pass is compared with what that one left. A pass in
    ``required`` that matches nothing is an error that names the reasons.
    """
    with tracing:
        return _run(program, passes, context, required, dump_dir)


def _run(
    program: Program,
    passes: Sequence[Pass],
    context: Context,
    required: Sequence[Pass],
    dump_dir: str | Path | None,
) -> Report:
    report = Report()
    parts = list(program.parts.values())
    references = [part(*part.examples) if part.examples else () for part in parts]
    for index, step in enumerate(passes):
        name = type(step).__name__
        before = len(program.graph.nodes)
        start = time.perf_counter()
        results = [_apply(step, part, context) for part in parts]
        result = results[0]
        seconds = time.perf_counter() - start
        if not result.matches and any(step is asked for asked in required):
            reasons = "; ".join(f"{where}: {why}" for where, why in result.skipped[:3])
            raise RegraftError(f"{name} matched nothing. {reasons or 'No candidate in the graph.'}")
        error = None
        if step.tolerance is None and result.matches:
            references = [part(*part.examples) if part.examples else () for part in parts]
        elif step.tolerance is not None and references[0]:
            changed = zip(references, parts, results, strict=True)
            error = max(
                (
                    _error(name, step.tolerance, r, part)
                    for r, part, made in changed
                    if made.matches
                ),
                default=0.0,
            )
        after = len(program.graph.nodes)
        row = Row(name, result.matches, result.skipped, before, after, seconds, error)
        report.rows.append(replace(row, picture=result.picture))
        if dump_dir is not None:
            folder = Path(dump_dir)
            folder.mkdir(parents=True, exist_ok=True)
            for prefix, part in program.parts.items():
                (folder / f"{index + 1:02d}_{prefix}{name}.txt").write_text(part.text())
    _share_stacked(program)
    return report


def _apply(step: Pass, program: Program, context: Context) -> PassResult:
    result = step.apply(program, context)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    program.verify()
    return result


def _share_stacked(program: Program) -> None:
    """Weights that the program and its prefill stack alike are the same tensors."""
    made: dict[tuple[str, ...], Any] = {}
    for part in program.parts.values():
        known = part.metadata.get("parameters", {})
        for name, sources in part.metadata.get("stacked", {}).items():
            if all(source in known for source in sources):
                key = tuple(known[source] for source in sources)
                tensor = made.setdefault(key, getattr(part.graph_module, name))
                setattr(part.graph_module, name, tensor)


def _error(name: str, tolerance: float, reference: Sequence[Any], program: Program) -> float:
    """The largest change of the outputs; states of the cache are not compared.

    Half precision may change by ROUNDINGS of its own more: another order of sums does.
    """
    worst = 0.0
    changed = program(*program.examples)
    for spec, before, after in zip(program.outputs, reference, changed, strict=True):
        if spec.role == "cache" or not before.numel():
            continue
        limit = tolerance
        if before.is_floating_point():
            limit = max(tolerance, ROUNDINGS * torch.finfo(before.dtype).eps)
        before, after = before.float(), after.float()
        same = (before == after) | (before.isnan() & after.isnan())
        error = (before - after).abs().masked_fill(same, 0.0).max().item()
        if not error <= limit * before.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item():
            raise RegraftError(
                f"{name} changed the output {spec.name} by {error:.1e}, over {limit:.0e} of "
                "its scale; compile without it and report the model"
            )
        worst = max(worst, error)
    return worst


def is_call(node: Any, target: Any) -> bool:
    return isinstance(node, torch.fx.Node) and node.op == "call_function" and node.target == target
