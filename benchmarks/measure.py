"""Groups: every backend of a case prepared, compared with eager, and timed in turns."""

from __future__ import annotations

import dataclasses
import gc
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import quiet
import rows
import torch
import workloads
from backends import TITLES, Prepared, Task, leaves_of, prepare
from interleave import Effort, Turns, compare, interleave
from rows import Row

__all__ = ["AGAIN", "Finding", "Group", "measure", "settle"]

log = logging.getLogger("benchmarks")

# Relative L2 error from which an answer in fp32 is wrong; what ovshim itself allows for fp32.
TOLERANCE = 1e-4
# Eager a second time: what the machine makes of one and the same program.
AGAIN = "eager again"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is known of one backend before it is timed; `call` is None where it is not timed."""

    call: Callable[[], Any] | None
    precision: str = "f32"
    error: float | None = None
    remark: str = ""
    wrong: bool = False


@dataclasses.dataclass(frozen=True)
class Group:
    """A measured case: its rows by backend, what precision each ran in, which were wrong, and how
    the measurement went."""

    rows: Mapping[str, Row]
    findings: Mapping[str, Finding]
    turns: Turns


def measure(case: workloads.Case, backends: Sequence[str], effort: Effort, small: bool) -> Group:
    """Prepare, compare and time the backends of a case; eager is always among them."""
    # Not for the clock alone: ovshim's own race, at build time, should be a fair one too.
    quiet.wait(effort.patience)
    module, (args, kwargs) = workloads.make(case, small)
    wanted = dict.fromkeys(("eager", *backends))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        with torch.inference_mode():
            task = Task(module, args, kwargs, Path(directory))
            expected = [t.clone() for t in leaves_of(task.eager())]
            found = {name: _find(name, task, expected) for name in wanted}
            ways = {name: f.call for name, f in found.items() if f.call is not None}
            turns = settle({**ways, AGAIN: ways["eager"]}, effort)
        group = Group(_rows(str(case), found, turns), _without_calls(found), turns)
        # Before the files go: Windows does not delete what is mapped.
        del found, ways, task, module
        torch.compiler.reset()
        gc.collect()
    return group


def _find(name: str, task: Task, expected: Sequence[torch.Tensor]) -> Finding:
    try:
        prepared = prepare(name, task)
        outputs = [t.clone() for t in prepared.outputs(prepared.call())]
    except Exception as error:  # any backend may fail in any way: that is a result too
        log.warning("%s cannot be measured", name, exc_info=True)
        lines = str(error).strip().splitlines() or [""]
        return Finding(None, remark=f"failed: {type(error).__name__}: {lines[0][:80]}")
    return _compared(prepared, outputs, expected)


def _compared(
    prepared: Prepared, outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> Finding:
    if [t.shape for t in outputs] != [t.shape for t in expected]:
        return Finding(None, prepared.precision, remark="wrong: other shapes", wrong=True)
    error = max(map(_relative_error, expected, outputs))
    if not error <= TOLERANCE:
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
