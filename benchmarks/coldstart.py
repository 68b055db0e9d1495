"""From a process that has torch and the model to its first output, everything cached.

    python coldstart.py prime|openvino|ovshim|otherwise|at-call|background WORKLOAD DIRECTORY
                        [--small]

`prime` fills the directory (IR for raw OpenVINO, ovshim's cache); the others print their seconds as
one line of JSON. `ovshim` is called with its example first, `otherwise` with something else.
`at-call` is ovshim without an example, `background` with `background=True`; both are called again
and again until OpenVINO answers. Each is meant for a process of its own.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import workloads
from torch import nn


def _openvino(
    module: nn.Module, arguments: workloads.Arguments, directory: Path
) -> dict[str, float]:
    """What one writes by hand: compile the IR from its file, infer on static inputs."""
    leaves = [*arguments[0], *arguments[1].values()]
    marks = [time.perf_counter()]
    import openvino

    marks.append(time.perf_counter())
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(directory / "raw" / "model.xml"), "CPU", settings)
    marks.append(time.perf_counter())
    compiled([leaf.numpy() for leaf in leaves])
    marks.append(time.perf_counter())
    return _spent(marks)


def _ovshim(
    module: nn.Module,
    arguments: workloads.Arguments,
    directory: Path,
    example: bool = True,
    background: bool = False,
    called_with: workloads.Arguments | None = None,
) -> dict[str, float]:
    args, kwargs = arguments
    marks = [time.perf_counter()]
    import ovshim

    marks.append(time.perf_counter())
    fast = ovshim.accelerate(
        module,
        args or None if example else None,
        example_kwargs=kwargs or None if example else None,
        prefer="openvino",
        cache_dir=directory / "cache",
        background=background,
    )
    args, kwargs = called_with or arguments
    marks.append(time.perf_counter())
    fast(*args, **kwargs)
    marks.append(time.perf_counter())
    spent = _spent(marks)
    if background or not example:
        while not fast.ovshim.stats()["openvino"]:
            fast(*args, **kwargs)
        spent["by OpenVINO"] = time.perf_counter() - marks[0]
    plan = ovshim.explain(fast).to_dict()["plans"][0]
    if plan["path"] != "openvino":
        raise SystemExit(f"eager served: {plan['reason']}")
    stages = {f"stage {name}": spent for name, spent in plan["seconds"].items()}
    return {**spent, **stages, "hit": plan["cache"] == "hit"}


def _otherwise(
    module: nn.Module, arguments: workloads.Arguments, directory: Path
) -> dict[str, float]:
    args, kwargs = arguments
    other = tuple(x.flip(-1) for x in args), {name: x.flip(-1) for name, x in kwargs.items()}
    return _ovshim(module, arguments, directory, called_with=other)


def _prime(module: nn.Module, arguments: workloads.Arguments, directory: Path) -> dict[str, float]:
    from backends import Task

    found = _ovshim(module, arguments, directory)
    task = Task(module, *arguments, directory)
    task.save(directory / "raw")
    return found


def _spent(marks: list[float]) -> dict[str, float]:
    imported, ready, first = (b - a for a, b in itertools.pairwise(marks))
    total = marks[-1] - marks[0]
    return {
        "import": imported,
        "ready": ready,
        "first": first,
        "total": total,
        "by OpenVINO": total,
    }


_WAYS: dict[str, Callable[[nn.Module, workloads.Arguments, Path], dict[str, Any]]] = {
    "prime": _prime,
    "openvino": _openvino,
    "ovshim": _ovshim,
    "otherwise": _otherwise,
    "at-call": functools.partial(_ovshim, example=False),
    "background": functools.partial(_ovshim, background=True),
}


def main() -> None:
    way, workload, directory = sys.argv[1:4]
    module, arguments = workloads.make(workloads.Case(workload, 1), "--small" in sys.argv)
    # Eager has run before in any process that would compare: its own first call is not ours to pay.
    with torch.inference_mode():
        module(*arguments[0], **arguments[1])
        print(json.dumps(_WAYS[way](module, arguments, Path(directory))))


if __name__ == "__main__":
    main()
