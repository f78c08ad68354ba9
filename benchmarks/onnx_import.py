"""ONNX's own node cases: how many the importer computes as expected, and how many its peers.

Peers: onnxruntime; TVM's importer, compiled for llvm; onnx2pytorch where it is installed.
"""

from __future__ import annotations

import importlib.util
import pickle
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from regraft.benchmarks.harness import Check, Result, environment
from regraft.benchmarks.small_models import one_line
from regraft.benchmarks.survey import survey

EVERY = 16
"""With quick, one case in so many."""


def run(quick: bool) -> Result:
    known = cases()[:: EVERY if quick else 1]
    with TemporaryDirectory(prefix="regraft-") as folder:
        paths = {case.name: Path(folder, case.name) for case in known}
        for case in known:
            paths[case.name].write_bytes(pickle.dumps(case))
        types = list(map(str, paths.values()))
        answers = {
            name: survey(types, one, _outcome, f"{name}:") for name, one in contenders().items()
        }
    rows: dict[str, dict[str, Any]] = {}
    failing: dict[str, dict[str, dict[str, str]]] = {name: {} for name in answers}
    totals = dict.fromkeys((*answers, "both"), 0)
    for case in known:
        reasons = {name: given[str(paths[case.name])]["reason"] for name, given in answers.items()}
        passed = {name: reason == "" for name, reason in reasons.items()}
        family, operator = family_of(case)
        row = rows.setdefault(family, {"test": family, "cases": 0, **dict.fromkeys(answers, 0)})
        row["cases"] += 1
        for name, good in passed.items():
            row[name] += good
            totals[name] += good
        totals["both"] += passed["ours"] and passed["onnxruntime"]
        for name, reason in reasons.items():
            if reason:
                failing[name][case.name] = {"operator": operator, "reason": reason}
    return Result(
        f"regraft bench onnx-import{' --quick' if quick else ''}",
        environment() | _versions(),
        [
            *(rows[family] for family in sorted(rows)),
            {
                "test": "all",
                "cases": len(known),
                **{k: v for k, v in totals.items() if k in answers},
            },
        ],
        [
            Check.at_least(
                "of the cases that onnxruntime passes, ours",
                totals["both"] / max(1, totals["onnxruntime"]),
                0.95,
            ),
            Check.at_least(
                "ours / onnxruntime, in all", totals["ours"] / max(1, totals["onnxruntime"]), 1
            ),
        ],
        chart="ours",
        extra={"failing": failing},
    )


@lru_cache
def cases() -> list[Any]:
    """The node cases of the installed onnx, with arrays as they are at the graph's edges."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return collect_testcases(None)


def family_of(case: Any) -> tuple[str, str]:
    """The family of a case's operator, and its name; control flow and what expands as named."""
    from regraft.frontends.onnx import registry

    opsets = {opset.domain: opset.version for opset in case.model.opset_import}
    known = [
        (registry.handler(node.domain, node.op_type, opsets.get(node.domain, 1)), node.op_type)
        for node in case.model.graph.node
        if node.op_type != "Constant"
    ]
    for handler, name in known:
        if handler is not None:
            return handler.family, name
    return "expanded", known[0][1] if known else "Constant"


def contenders() -> dict[str, Callable[[str], dict[str, Any]]]:
    """What answers each case's path, by name."""
    found: dict[str, Callable[[str], dict[str, Any]]]
    found = {"ours": ours, "onnxruntime": onnxruntime, "tvm": tvm}
    if importlib.util.find_spec("onnx2pytorch"):
        found["onnx2pytorch"] = onnx2pytorch
    return found


def ours(path: str) -> dict[str, Any]:
    return _answer(path, run_ours)


def onnxruntime(path: str) -> dict[str, Any]:
    return _answer(path, _peer(_run_onnxruntime))


def tvm(path: str) -> dict[str, Any]:
    return _answer(path, _peer(_run_tvm))


def onnx2pytorch(path: str) -> dict[str, Any]:
    return _answer(path, _peer(_run_onnx2pytorch))


def _answer(path: str, compute: Callable[[Any, list], list]) -> dict[str, Any]:
    try:
        check(pickle.loads(Path(path).read_bytes()), compute)
    except Exception as error:
        return _outcome(one_line(error) or "failed")
    return _outcome()


def _outcome(reason: str = "", runs: bool = False) -> dict[str, Any]:
    return {"reason": reason[:160]}


def check(case: Any, compute: Callable[[Any, list], list] | None = None) -> None:
    """AssertionError where the outputs are not the expected ones, as onnx compares them."""
    from onnx.backend.test.runner import Runner

    for given, expected in case.data_sets:
        found = (compute or run_ours)(case.model, _arrays(given))
        wanted, got = _flat(_arrays(expected)), _flat(found)
        Runner.assert_similar_outputs(wanted, got, case.rtol, case.atol)


def _flat(values: list[Any]) -> list[Any]:
    """Sequences as their length and their items."""
    flat: list[Any] = []
    for value in values:
        items = _flat(value) if isinstance(value, list) else [value]
        flat += [np.asarray(len(value)), *items] if isinstance(value, list) else items
    return flat


def _arrays(values: Iterable[Any]) -> list[Any]:
    from onnx import TensorProto, numpy_helper

    return [
        numpy_helper.to_array(value)
        if isinstance(value, TensorProto)
        else _arrays(value)
        if isinstance(value, (list, tuple))
        else None
        if value is None
        else np.asarray(value)
        for value in values
    ]


def run_ours(model: Any, inputs: list[Any]) -> list[Any]:
    """The outputs of eager torch, as arrays."""
    import torch

    from regraft.frontends.onnx.module import OnnxModule
    from regraft.frontends.onnx.values import from_numpy, to_numpy

    def given(value: Any) -> Any:
        if isinstance(value, list):
            return [given(item) for item in value]
        return value if value is None else from_numpy(value.copy())

    module = OnnxModule(model)
    with torch.no_grad():
        outputs = module(*map(given, inputs))
    if len(module.outputs) == 1:
        outputs = (outputs,)
    return [
        to_numpy(value, dtype) for value, dtype in zip(outputs, module.output_types, strict=True)
    ]


def _peer(run: Callable[[Any, dict[str, Any]], list]) -> Callable[[Any, list], list]:
    """What computes a case by run(model, arrays by name), which knows numpy's own types alone."""

    def compute(model: Any, inputs: list[Any]) -> list[Any]:
        plain, feeds, types = _plain(model, inputs)
        return [
            value if dtype is None else value.astype(dtype)
            for value, dtype in zip(run(plain, feeds), types, strict=True)
        ]

    return compute


def _run_onnxruntime(model: Any, feeds: dict[str, Any]) -> list[Any]:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def _run_tvm(model: Any, feeds: dict[str, Any]) -> list[Any]:
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    module = relax.transform.DecomposeOpsForInference()(from_onnx(model))
    machine = relax.VirtualMachine(tvm.compile(module, target="llvm"), tvm.cpu())
    found = machine["main"](*(tvm.runtime.tensor(value) for value in feeds.values()))
    if len(model.graph.output) == 1:
        found = [found]
    return [x.numpy() if hasattr(x, "numpy") else np.asarray(list(x)) for x in found]


def _run_onnx2pytorch(model: Any, feeds: dict[str, Any]) -> list[Any]:
    import onnx2pytorch
    import torch

    def given(value: Any) -> Any:
        if isinstance(value, list):
            return [given(item) for item in value]
        return torch.from_numpy(np.array(value))

    def taken(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [taken(item) for item in value]
        return np.asarray(value)

    module = onnx2pytorch.ConvertModel(model, experimental=True).eval()
    with torch.no_grad():
        found = module(*map(given, feeds.values()))
    return taken([found] if len(model.graph.output) == 1 else found)


def _plain(model: Any, inputs: list[Any]) -> tuple[Any, dict[str, Any], list[Any]]:
    """The model with numpy's own types at its edges: inputs of others are initialisers, outputs
    are cast to float32, and have the type that they stand for."""
    from onnx import TensorProto, helper, numpy_helper

    plain = type(model)()
    plain.CopyFrom(model)
    feeds: dict[str, Any] = {}
    for spec, value in zip(model.graph.input, inputs, strict=False):
        if isinstance(value, np.ndarray) and value.dtype.isbuiltin == 2:
            plain.graph.input.remove(spec)
            plain.graph.initializer.append(numpy_helper.from_array(value, spec.name))
        else:
            feeds[spec.name] = value
    types: list[Any] = []
    for spec in plain.graph.output:
        kind = spec.type.tensor_type.elem_type
        dtype = helper.tensor_dtype_to_np_dtype(kind) if kind else None
        odd = dtype is not None and dtype.isbuiltin == 2
        types.append(dtype if odd else None)
        if odd:
            name = f"{spec.name}_plain"
            plain.graph.node.append(
                helper.make_node("Cast", [spec.name], [name], to=TensorProto.FLOAT)
            )
            spec.name, spec.type.tensor_type.elem_type = name, TensorProto.FLOAT
    return plain, feeds, types


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime

    return {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
