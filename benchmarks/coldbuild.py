"""What a build takes in a process that has torch and the model, nothing cached.

    python coldbuild.py hand|ovshim WORKLOAD DIRECTORY [--small]

`hand` calls the three steps that no build can leave out: torch's capture (Dynamo, and a trace of
what it gave), OpenVINO's frontend, `compile_model`. Each prints its seconds as one line of JSON and
is meant for a process of its own; `ovshim` makes a cache in the directory that it is given.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import workloads
from torch import nn


class _Captured(nn.Module):
    """Dynamo's graph as a module that can be traced: the weights, which it takes as arguments, are
    constants in it, and the call's own tensors its inputs."""

    def __init__(self, graph: Any, given: tuple[Any, ...], inputs: list[torch.Tensor]) -> None:
        super().__init__()
        self._call = graph.forward
        self._given = [g.detach() if isinstance(g, torch.Tensor) else g for g in given]
        found = [next((n for n, x in enumerate(inputs) if x is g), None) for g in given]
        self.order = [n for n in range(len(inputs)) if n in found]
        self._places = [None if n is None else self.order.index(n) for n in found]

    def forward(self, *tensors: torch.Tensor) -> Any:
        pairs = zip(self._places, self._given, strict=True)
        return self._call(
            *(
                tensors[place]
                if place is not None
                else tensors[0].shape[0]
                if isinstance(given, int)
                else given
                for place, given in pairs
            )
        )


def by_hand(
    module: nn.Module, arguments: workloads.Arguments, precision: str = "f32"
) -> tuple[Any, dict[str, float]]:
    """What answers like the module, compiled by OpenVINO, and the seconds of each stage.

    Args:
        precision: as OpenVINO calls it.
    """
    args, kwargs = arguments
    leaves = [*args, *kwargs.values()]
    kept: list[tuple[Any, tuple[Any, ...]]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*given: Any) -> Any:
            kept[:] = [(graph, given)]
            return graph(*given)

        return run

    marks = [time.perf_counter()]
    import torch._dynamo
    import torch.fx.experimental._config

    for leaf in leaves:
        torch._dynamo.maybe_mark_dynamic(leaf, 0)
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        torch.compile(module, backend=backend, fullgraph=True)(*args, **kwargs)
    captured = _Captured(*kept[0], leaves)
    inputs = [leaves[n] for n in captured.order]
    traced = torch.jit.trace(captured, tuple(inputs), strict=False, check_trace=False)  # type: ignore[no-untyped-call]
    marks.append(time.perf_counter())
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced)
    model = frontend.convert(frontend.load(decoder))
    for parameter, tensor in zip(model.get_parameters(), inputs, strict=True):
        parameter.set_partial_shape(openvino.PartialShape([-1, *tensor.shape[1:]]))
    model.validate_nodes_and_infer_types()
    marks.append(time.perf_counter())
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    marks.append(time.perf_counter())
    traced_in, converted_in, compiled_in = (b - a for a, b in itertools.pairwise(marks))
    seconds = {
        "capture": traced_in + converted_in,
        "compile": compiled_in,
        "further": 0.0,
        "proof": 0.0,
        "race": 0.0,
        "build": marks[-1] - marks[0],
    }

    def answers(*inputs: torch.Tensor) -> Any:
        return compiled([inputs[n].numpy() for n in captured.order])

    return answers, seconds


def _hand(module: nn.Module, arguments: workloads.Arguments, directory: Path) -> dict[str, float]:
    return by_hand(module, arguments)[1]


def _ovshim(module: nn.Module, arguments: workloads.Arguments, directory: Path) -> dict[str, float]:
    args, kwargs = arguments
    began = time.perf_counter()
    import ovshim

    fast = ovshim.accelerate(
        module,
        args or None,
        example_kwargs=kwargs or None,
        cache_dir=tempfile.mkdtemp(dir=directory),
    )
    spent = time.perf_counter() - began
    plan = ovshim.explain(fast).to_dict()["plans"][0]
    if plan["cache"] != "miss":
        raise SystemExit(f"nothing was built: {plan['reason']}")
    seconds = plan["seconds"]
    stages = {name: seconds.get(name, 0.0) for name in ("capture", "compile", "proof", "race")}
    build = spent - stages["proof"] - stages["race"]
    return {**stages, "further": build - stages["capture"] - stages["compile"], "build": build}


_WAYS = {"hand": _hand, "ovshim": _ovshim}


def main() -> None:
    way, workload, directory = sys.argv[1:4]
    module, arguments = workloads.make(workloads.Case(workload, 1), "--small" in sys.argv)
    with torch.no_grad():
        module(*arguments[0], **arguments[1])
        print(json.dumps(_WAYS[way](module, arguments, Path(directory))))


if __name__ == "__main__":
    main()
