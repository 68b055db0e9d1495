"""Graphs on the way to a lower precision: put into a form that NNCF knows, run, compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ovshim import runtime
from ovshim.capture import names
from ovshim.unfused import properties_for

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["array", "error", "prepare", "run"]


def prepare(model: ov.Model) -> None:
    """Fold BatchNorm into convolutions and the like, as OpenVINO's own conversion does, and name
    operations for the modules that they are marked with."""
    runtime.fold(model)
    for node in model.get_ordered_ops():
        # A convolution that folding has left without marks is known by what is added to its result,
        # which was its bias and is BatchNorm's now.
        if names.path_of(node) is None and "Convolution" in node.get_type_name():
            for port in node.output(0).get_target_inputs():
                names.same_origin(node, port.get_node())
    names.name_by_module(model)


def array(tensor: torch.Tensor) -> Any:
    """An input as OpenVINO takes it; NumPy has no bfloat16."""
    if tensor.dtype is torch.bfloat16:
        ov = runtime.openvino()
        bits = tensor.view(torch.int16).numpy()
        return ov.Tensor(bits, list(tensor.shape), ov.Type.bf16)
    return tensor.numpy()


def run(model: ov.Model, inputs: Sequence[Sequence[torch.Tensor]]) -> list[list[Any]]:
    """The outputs for each input, each operation in its own type."""
    settings = {"INFERENCE_PRECISION_HINT": "dynamic", **properties_for(model, "CPU")}
    compiled = runtime.core().compile_model(model, "CPU", settings)
    return [list(compiled([array(x) for x in given]).to_tuple()) for given in inputs]


def error(exact: Sequence[Sequence[Any]], other: Sequence[Sequence[Any]]) -> float:
    """The worst output's relative L2 error: 99 of 100 samples are no further off. Small outputs
    count by the usual size, or a sample that is all but zero would decide."""
    worst = 0.0
    for mine, others in zip(zip(*exact, strict=True), zip(*other, strict=True), strict=True):
        if mine[0].dtype.kind != "f":
            continue
        norms = np.array([np.linalg.norm(m.astype(np.float64)) for m in mine])
        pairs = zip(mine, others, strict=True)
        apart = np.array([np.linalg.norm(o.astype(np.float64) - m) for m, o in pairs])
        floor = max(float(np.median(norms)), np.finfo(np.float64).tiny)
        errors = np.nan_to_num(apart / np.maximum(norms, floor), nan=np.inf)
        worst = max(worst, float(np.percentile(errors, 99)))
    return worst
