"""Groups: every backend of a case prepared, compared with eager, and timed in turns."""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import quiet
import rows
import torch
import workloads
from backends import TITLES, Prepared, Task, dynamo_as_it_was, leaves_of, prepare
from interleave import Effort, Turns, compare, interleave
from rows import Row
from torch import nn

__all__ = ["AGAIN", "Finding", "Group", "measure", "measure_ways", "settle"]

log = logging.getLogger("benchmarks")

# Relative L2 error from which an answer in fp32 is wrong; what ovshim itself allows for fp32.
TOLERANCE = 1e-4
# And of what does not compute in fp32.
_TOLERANCE_LOW = 0.1
# Eager a second time: what the machine makes of one and the same program.
AGAIN = "eager again"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is known of one backend before it is timed; `call` is None where it is not timed.

    `seconds`: what it took to make it ready; `bytes`: of its files.
    """

    call: Callable[[], Any] | None
    precision: str = "f32"
    error: float | None = None
    remark: str = ""
    wrong: bool = False
    seconds: float | None = None
    bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """A measured case: its rows by backend, what precision each ran in, which were wrong, and how
    the measurement went."""

    rows: Mapping[str, Row]
    findings: Mapping[str, Finding]
    turns: Turns


def measure(case: workloads.Case, backends: Sequence[str], effort: Effort, small: bool) -> Group:
    """Prepare, compare and time the backends of a case; eager is always among them."""
    made = {name: functools.partial(prepare, name) for name in ("eager", *backends)}
    return measure_ways(str(case), lambda: workloads.make(case, small), made, effort)


def measure_ways(
    group: str,
    make: Callable[[], tuple[nn.Module, workloads.Arguments]],
    prepares: Mapping[str, Callable[[Task], Prepared]],
    effort: Effort,
    tolerance: float = TOLERANCE,
) -> Group:
    """Prepare, compare and time several ways of running one module.

    Args:
        make: makes the module and the arguments of a call.
        prepares: by name; "eager" has to be among them, and is the measure.
        tolerance: the relative L2 error from which a way is wrong, and not timed.
    """
    # Not for the clock alone: ovshim's own race, at build time, should be a fair one too.
    quiet.wait(effort.patience)
    module, (args, kwargs) = make()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory,
        dynamo_as_it_was(),
    ):
        task = Task(module, args, kwargs, Path(directory))
        with torch.inference_mode():
            expected = [t.clone() for t in leaves_of(task.eager())]
            found = {
                name: _find(name, functools.partial(prepared, task), expected, tolerance)
                for name, prepared in prepares.items()
            }
            ways = {name: f.call for name, f in found.items() if f.call is not None}
            turns = settle({**ways, AGAIN: ways["eager"]}, effort)
        measured = Group(_rows(group, found, turns), _without_calls(found), turns)
        # Before the files go: Windows does not delete what is mapped.
        del found, ways, task, module
        gc.collect()
    return measured


def _find(
    name: str, prepared: Callable[[], Prepared], expected: Sequence[torch.Tensor], tolerance: float
) -> Finding:
    started = time.perf_counter()
    try:
        made = prepared()
        seconds = time.perf_counter() - started
        outputs = [t.clone() for t in made.outputs(made.call())]
    except Exception as error:  # any backend may fail in any way: that is a result too
        log.warning("%s cannot be measured", name, exc_info=True)
        lines = str(error).strip().splitlines() or [""]
        return Finding(None, remark=f"failed: {type(error).__name__}: {lines[0][:80]}")
    found = _compared(made, outputs, expected, tolerance)
    return dataclasses.replace(found, seconds=seconds, bytes=made.bytes)


def _compared(
    prepared: Prepared,
    outputs: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    tolerance: float,
) -> Finding:
    if [t.shape for t in outputs] != [t.shape for t in expected]:
        return Finding(None, prepared.precision, remark="wrong: other shapes", wrong=True)
    error = max(map(_relative_error, expected, outputs))
    allowed = tolerance if prepared.precision == "f32" else max(tolerance, _TOLERANCE_LOW)
    if not error <= allowed:
        return Finding(None, prepared.precision, error, "wrong: not timed", wrong=True)
    return Finding(prepared.call, prepared.precision, error, prepared.note)


def _relative_error(expected: torch.Tensor, mine: torch.Tensor) -> float:
    distance = float(torch.linalg.vector_norm(mine.double() - expected.double()))
    norm = float(torch.linalg.vector_norm(expected.double()))
    return distance / norm if norm > 0 else distance


def settle(ways: Mapping[str, Callable[[], Any]], effort: Effort) -> Turns:
    """A measurement in which eager equals itself, or the best one of a few.

    Which one is kept depends on eager and eager again alone, so it favours nobody.
    """
    tried: list[Turns] = []
    while len(tried) < effort.attempts:
        tried.append(interleave(ways, effort))
        if _noise(tried[-1]) <= rows.QUIET - 1:
            break
    return dataclasses.replace(min(tried, key=_noise), attempts=len(tried))


def _noise(turns: Turns) -> float:
    """By how much eager differs from itself: 0.1 is a tenth slower or faster."""
    ratio = compare(turns.samples["eager"], turns.samples[AGAIN]).median
    return max(ratio, 1 / ratio) - 1


def _without_calls(found: Mapping[str, Finding]) -> dict[str, Finding]:
    """The findings without what keeps models in memory."""
    return {name: dataclasses.replace(f, call=None) for name, f in found.items()}


def _rows(group: str, found: Mapping[str, Finding], turns: Turns) -> dict[str, Row]:
    made, samples = {}, turns.samples
    eager, raw = samples["eager"], samples.get("openvino")
    # Eager again beside eager, the others as they come.
    for name, finding in {"eager": found["eager"], AGAIN: found["eager"], **found}.items():
        mine = samples.get(name, ())
        against_eager = compare(eager, mine) if mine and name != "eager" else None
        against_raw = compare(raw, mine) if raw and mine and name != "openvino" else None
        remark = finding.remark
        if name == AGAIN and against_eager is not None:
            remark = rows.noise(against_eager, turns)
        made[name] = Row(
            group=group,
            backend=TITLES.get(name, name),
            samples=tuple(mine),
            error=finding.error,
            eager=against_eager,
            raw=against_raw,
            remark=remark,
            ours=name.startswith("ovshim"),
        )
    return made
