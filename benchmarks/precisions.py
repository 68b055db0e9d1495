"""One model in every precision, beside what eager and its compiler offer in less than fp32."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import workloads
from backends import (
    Prepared,
    Task,
    leaves_of,
    lowered_inputs,
    module_bytes,
    prepare,
    raw_request,
    settle_sizes,
)
from interleave import Effort
from measure import Group, measure_ways
from rows import Row
from torch import nn
from trained import TRAINED

import ovshim
from ovshim import executed, runtime
from ovshim.bound import installed

__all__ = [
    "ACCURACY_HEAD",
    "ACCURACY_OF",
    "HEAD",
    "SUBJECTS",
    "Accuracy",
    "Lowered",
    "Subject",
    "accuracies",
    "lowered",
]

HEAD = (
    *("model", "way", "per call", "× eager", "× OpenVINO f32", "error"),
    *("runs in", "MB on disk", "made in, s", "remark"),
)
ACCURACY_HEAD = ("model", "way", "right, %", "points", "runs in", "kB on disk")
# A precision that is further off than this answers another question.
_TOLERANCE = 0.2
# Which precision asks for which `tolerance=`; the others have their own.
_LOWER = ("bf16", "fp16", "int8", "auto")
_PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int8_weights", "int4_weights", "auto")
_BUILD_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, a call of it, and inputs to calibrate by.

    Attributes:
        make: makes the module and the arguments; `small` asks for few operators.
        calibration: makes the inputs, in the form of `make`'s arguments.
    """

    name: str
    make: Callable[[bool], tuple[nn.Module, workloads.Arguments]]
    calibration: Callable[[bool], Sequence[Any]]

    def measured(self, effort: Effort, small: bool, inductor: bool) -> Group:
        ways = _ways(self.calibration(small), inductor)
        return measure_ways(self.name, lambda: self.make(small), ways, effort, _TOLERANCE)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A row of the page: how fast, how exact, how large, how long to make."""

    row: Row
    runs_in: str
    bytes: int | None
    seconds: float | None

    def cells(self) -> tuple[str, ...]:
        *cells, remark = self.row.cells()
        size = "" if self.bytes is None else f"{self.bytes / 1e6:.3g}"
        return (
            *cells,
            self.runs_in,
            size,
            "" if not self.seconds else f"{self.seconds:.1f}",
            remark,
        )


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """What a precision costs a trained model in right answers."""

    model: str
    way: str
    right: float
    points: float
    runs_in: str = ""
    bytes: int | None = None

    def cells(self) -> tuple[str, ...]:
        size = "" if self.bytes is None else f"{self.bytes / 1e3:.0f}"
        points = f"{self.points:+.2f}".replace("-", "−") if self.points else "0"
        return (self.model, self.way, f"{self.right:.2f}", points, self.runs_in, size)


def lowered(group: Group) -> list[Lowered]:
    """The rows of a measured group, as this page shows them."""
    made = []
    for name, row in group.rows.items():
        found = group.findings.get(name)
        if found is None or name == "eager":
            size = None if found is None else found.bytes
            made.append(Lowered(row, "f32", size, None))
        else:
            made.append(Lowered(row, found.precision, found.bytes, found.seconds))
    return made


# --- ways -------------------------------------------------------------------------------------


def _ways(calibration: Sequence[Any], inductor: bool) -> Mapping[str, Callable[[Task], Prepared]]:
    """By title; the compiler comes last, for it may leave threads that spin."""
    ways: dict[str, Callable[[Task], Prepared]] = {
        "eager": _eager,
        "eager .bfloat16()": functools.partial(prepare, "eager-bf16"),
        "eager under autocast": functools.partial(prepare, "autocast"),
        "openvino": functools.partial(_raw, hint="f32"),
        "raw OpenVINO, bf16": functools.partial(_raw, hint="bf16"),
    }
    for precision in _PRECISIONS:
        given = {"tolerance": _TOLERANCE} if precision in _LOWER else {}
        data = {"calibration": calibration} if precision in ("int8", "auto") else {}
        ways[f'ovshim, "{precision}"'] = functools.partial(
            _ovshim, precision=precision, options={**given, **data}
        )
    ways['raw OpenVINO on the graph of "int8"'] = functools.partial(_raw_int8, calibration)
    if inductor:
        ways["torch.compile of .bfloat16()"] = _compiled_bf16
    return ways


def _eager(task: Task) -> Prepared:
    made = prepare("eager", task)
    return dataclasses.replace(made, bytes=module_bytes(task.module))


def _compiled_bf16(task: Task) -> Prepared:
    module = copy.deepcopy(task.module).bfloat16()
    torch.compiler.reset()
    compiled = torch.compile(module, dynamic=False, options={"freezing": True})
    args, kwargs = lowered_inputs((task.args, task.kwargs))
    call = functools.partial(compiled, *args, **kwargs)
    call()
    return Prepared(call, leaves_of, "bf16", "inductor, freezing, static shapes")


def _raw(task: Task, hint: str) -> Prepared:
    path = task.directory / "model.xml"
    return _raw_of(path if path.exists() else task.save(task.directory), task, hint)


def _raw_of(path: Path, task: Task, hint: str) -> Prepared:
    """A graph at these very sizes, inputs bound once, outputs in the request's own memory."""
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    model = runtime.core().read_model(path)
    _, tensors = task.flat()
    model.reshape({i: list(tensor.shape) for i, tensor in enumerate(tensors)})
    compiled = runtime.core().compile_model(model, "CPU", settings)

    def outputs(answer: Any) -> list[torch.Tensor]:
        # Behind the model's own a graph of ours may say whether all indices were in range.
        arrays = [array for array in answer.values() if array.dtype != bool]
        return [torch.from_numpy(array.copy()) for array in arrays]

    ran = executed.precision_run(compiled)
    note = "outputs not owned"
    return Prepared(raw_request(compiled, tensors), outputs, ran, note, _size(path))


def _raw_int8(calibration: Sequence[Any], task: Task) -> Prepared:
    """What is lost on top of the graph that NNCF makes: the same at fixed sizes, called bare."""
    options = {"tolerance": _TOLERANCE, "calibration": calibration}
    plan = _plan(_accelerated(task, "int8", options))
    return _raw_of(plan.graph.source, task, "f32" if plan.graph.hint == "fp32" else "bf16")


def _ovshim(task: Task, precision: str, options: Mapping[str, Any]) -> Prepared:
    fast = _accelerated(task, precision, options)
    plan = _plan(fast)
    call = functools.partial(fast, *task.args, **task.kwargs)
    settle_sizes(fast, call)
    note = ", ".join(filter(None, (plan.lowered.get("preset"), _chosen(plan))))
    return Prepared(call, leaves_of, plan.precision_run or "?", note, _size(plan.graph.source))


def _chosen(plan: Any) -> str:
    """What `auto` has decided for; empty for other precisions."""
    names = [str(row["precision"]) for row in plan.candidates if row["chosen"]]
    return f"chose {names[0]}" if names else ""


def _accelerated(task: Task, precision: Any, options: Mapping[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        # What a processor has not is in the column of what really ran.
        warnings.simplefilter("ignore", ovshim.PrecisionWarning)
        return ovshim.accelerate(
            task.module,
            task.args or None,
            example_kwargs=task.kwargs or None,
            precision=precision,
            prefer="openvino",
            cache_dir=task.directory / "cache",
            max_build_seconds=_BUILD_SECONDS,
            **options,
        )


def _plan(fast: nn.Module) -> Any:
    """The plan that OpenVINO serves; RuntimeError where eager does."""
    (plan,) = installed(fast)["forward"].dispatcher.plans  # type: ignore[attr-defined]
    if plan.served is None:
        raise RuntimeError(f"eager serves: {plan.reason}")
    return plan


def _size(path: Path) -> int:
    return path.stat().st_size + path.with_suffix(".bin").stat().st_size


# --- models -----------------------------------------------------------------------------------


def _workload(name: str) -> Subject:
    case = workloads.Case(name, 1)

    def calibration(small: bool) -> list[Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            calls = [workloads.arguments(case, small) for _ in range(10)]
        return [args or kwargs for args, kwargs in calls]

    return Subject(name, lambda small: workloads.make(case, small), calibration)


def _of_trained(name: str) -> Subject:
    def make(small: bool) -> tuple[nn.Module, workloads.Arguments]:
        model = TRAINED[name]()
        return model.module, ((model.inputs[0][:1],), {})

    return Subject(name, make, lambda small: TRAINED[name]().calibration)


SUBJECTS = {
    subject.name: subject
    for subject in (
        *map(_workload, ("ResNet-50", "BERT-base/128")),
        *map(_of_trained, TRAINED),
    )
}
ACCURACY_OF = tuple(TRAINED)


def accuracies(name: str, directory: Path) -> list[Accuracy]:
    """Every precision of a trained model, counted in right answers."""
    model = TRAINED[name]()
    exact = model.right(model.module)
    found = [Accuracy(name, "eager", exact, 0.0, "f32", module_bytes(model.module))]
    half = copy.deepcopy(model.module).bfloat16()
    right = model.right(lambda x: half(lowered_inputs(x)))
    found.append(
        Accuracy(name, "eager .bfloat16()", right, right - exact, "bf16", module_bytes(half))
    )
    task = Task(model.module, (model.inputs[0],), {}, directory)
    for precision in (*_PRECISIONS, model.rules):
        learned = precision in ("int8", "auto", model.rules)
        data = {"calibration": model.calibration} if learned else {}
        fast = _accelerated(task, precision, data)
        right = model.right(fast)
        way = f'ovshim, "{precision}"' if isinstance(precision, str) else f"ovshim, {precision}"
        found.append(Accuracy(name, way, right, right - exact, *_ran(fast)))
    return found


def _ran(fast: nn.Module) -> tuple[str, int | None]:
    """What an accelerated module runs in, and its size on disk."""
    try:
        plan = _plan(fast)
    except RuntimeError as error:
        return str(error), None
    ran = str(plan.precision_run)
    if plan.modules:  # read back from what was compiled, and compared with the rules
        found = ", ".join(sorted({one for ran in plan.modules.values() for one in ran.split(", ")}))
        ran = f"{found}: {'other than asked' if plan.warnings else 'as asked'}"
    return ", ".join(filter(None, (ran, _chosen(plan)))), _size(plan.graph.source)
