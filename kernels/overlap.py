"""Kernels for CUDA that begin while the kernel before them ends (programmatic dependent launch).

What such a kernel does before ``end_previous`` must not depend on what earlier kernels write; from
``begin_next`` on, the next one may begin if it is such a kernel too. From Hopper on.
"""

from __future__ import annotations

from typing import Any

import tvm

NAME = "regraft overlapping"
TAG = "tirx.use_programtic_dependent_launch"
PARAMETERS = "tirx.kernel_launch_params"


def _pipeline() -> Any:
    lower, *rest = tvm.tirx.get_tir_pipeline("tirx")

    @tvm.transform.module_pass(opt_level=0)
    def tagged(module: tvm.IRModule, _: Any) -> tvm.IRModule:
        module = lower(module)
        for name, function in module.functions.items():
            if parameters := function.attrs.get(PARAMETERS):
                module[name] = function.with_attr(PARAMETERS, [*parameters, TAG])
        return module

    return tagged, *rest


tvm.tirx.register_tir_pipeline(NAME, _pipeline)
