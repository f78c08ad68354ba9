"""ONNX's own node cases: how many the importer computes as expected, and how many onnxruntime."""

from __future__ import annotations

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
            name: survey(types, one, _outcome, f"{name}:")
            for name, one in (("ours", ours), ("onnxruntime", stock))
        }
    rows: dict[str, dict[str, Any]] = {}
    failing: dict[str, dict[str, dict[str, str]]] = {name: {} for name in answers}
    totals = {"ours": 0, "onnxruntime": 0, "both": 0}
    for case in known:
        reasons = {name: given[str(paths[case.name])]["reason"] for name, given in answers.items()}
        passed = {name: reason == "" for name, reason in reasons.items()}
        family, operator = family_of(case)
        row = rows.setdefault(family, {"test": family, "cases": 0, "ours": 0, "onnxruntime": 0})
        row["cases"] += 1
        for name, good in passed.items():
            row[name] += good
            totals[name] += good
        totals["both"] += all(passed.values())
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


def ours(path: str) -> dict[str, Any]:
    return _answer(path, run_ours)


def stock(path: str) -> dict[str, Any]:
    return _answer(path, _run_onnxruntime)


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
        Runner.assert_similar_outputs(_arrays(expected), found, case.rtol, case.atol)


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


def _run_onnxruntime(model: Any, inputs: list[Any]) -> list[Any]:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [spec.name for spec in session.get_inputs()]
    feeds = dict(zip(names, inputs, strict=False))
    outputs = session.get_outputs()
    kinds = [value.type for value in (*session.get_inputs(), *outputs)]
    if not any("float8" in kind or "int4" in kind or "bfloat16" in kind for kind in kinds):
        return session.run(None, feeds)
    ready = {name: _ort_value(value) for name, value in feeds.items()}
    made = session.run_with_ort_values([spec.name for spec in outputs], ready)
    return [_ort_array(value) for value in made]


def _ort_value(array: np.ndarray) -> Any:
    """A value of a type that numpy lacks, of the same bits."""
    from onnx.helper import np_dtype_to_tensor_dtype
    from onnxruntime import OrtValue

    if array.dtype.kind in "biufO" and array.dtype.isbuiltin:
        return OrtValue.ortvalue_from_numpy(array)
    bits = array.view(f"u{array.itemsize}")
    return OrtValue.ortvalue_from_numpy_with_onnx_type(bits, np_dtype_to_tensor_dtype(array.dtype))


def _ort_array(value: Any) -> np.ndarray:
    import torch
    from onnx.helper import tensor_dtype_to_np_dtype

    dtype = tensor_dtype_to_np_dtype(value.element_type())
    if "bfloat16" in dtype.name:
        bits = torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())
        return bits.view(torch.int16).numpy().view(dtype)
    array = value.numpy()
    return array if array.dtype == dtype else array.view(dtype)


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime

    return {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
