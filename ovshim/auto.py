"""`precision="auto"`: the fastest of the candidates that are exact enough.

Each candidate is built as if it had been asked for, with a cache entry of its own; those that are
exact enough on the samples held out run against each other in interleaved rounds. The decision is
kept with the entry of the module's own precision, for each processor and number of threads.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ovshim import runtime
from ovshim.build import build
from ovshim.building import own_modes
from ovshim.cache import Entry
from ovshim.infer import EngineDead
from ovshim.job import Job
from ovshim.lowering import samples_of
from ovshim.plan import OutOfRangeError, Plan
from ovshim.precision.calibration import Samples
from ovshim.progress import bar
from ovshim.race import rounds
from ovshim.signature import fits, flatten, sizes_of, unflatten
from ovshim.verify import Mismatch, compare, sample_error

__all__ = ["build", "build_auto"]

log = logging.getLogger("ovshim")

# How much faster a less exact candidate has to be.
_MARGIN = 1.1
_FEWEST_ROUNDS = 20
_ROUNDS_SECONDS = 2.0
# A function of the user's judges in the place of a number; what is off by more is not that answer.
_FAR_OFF = 1.0
# With these the module's own precision may yet be beaten; any other reason is one for all.
_OWN_ALONE = frozenset({"proof-failed", "compile-failed", "infer-failed", "slower"})

Row = dict[str, Any]


def build_auto(job: Job) -> Plan:
    """The plan of the best candidate, with the table of all of them.

    Raises:
        CalibrationError: see `build`.
        whatever the user's own function of tolerance raises.
    """
    with own_modes(job.grad):
        samples = None if job.options.calibration is None else samples_of(job)
        own = _built(job, job.own_precision)
        if own.reason is not None and own.reason.code not in _OWN_ALONE:
            own.precision = "auto"
            return own
        where = _where(job, samples)
        entry = _entry_of(job, own)
        found = None if entry is None else entry.manifest.get("auto")
        known = found if isinstance(found, dict) else {}
        plan = _remembered(job, own, known.get(where)) if where else None
        if plan is None:
            plan = _chosen(job, own, samples)
            if entry is not None and where:
                kept = {"chosen": plan.precision, "candidates": list(plan.candidates)}
                job.store.amend(entry, "auto", {**known, where: kept})
        plan.precision = "auto"
        return plan


def _built(job: Job, precision: str) -> Plan:
    """The plan of a candidate."""
    options = job.options
    tolerance = None if precision == job.own_precision else options.tolerance_for("auto")
    if callable(options.tolerance) and tolerance is not None:
        tolerance = _FAR_OFF
    changed = dataclasses.replace(options, precision=precision, tolerance=tolerance)
    return build(
        dataclasses.replace(job, options=changed, candidate=True, lowering=None, warnings=())
    )


def _where(job: Job, samples: Samples | None) -> str | None:
    """What a decision holds for; None where it cannot be said: a function has no name that would
    change with what it does."""
    if callable(job.options.tolerance):
        return None
    data = "none" if samples is None else samples.digest
    facts = [f"threads={job.placement['threads']}", f"sizes={sizes_of(job.leaves)}"]
    facts += [f"tolerance={job.options.tolerance_for('auto')}", f"prefer={job.options.prefer}"]
    return " ".join([runtime.processor(), *facts, f"samples={data}"])


def _entry_of(job: Job, plan: Plan) -> Entry | None:
    """The entry that a plan came from or went to."""
    if plan.family is None:
        return None
    entries = job.store.entries(plan.family)
    return next((entry for entry in entries if str(entry.path) == plan.cache_path), None)


def _remembered(job: Job, own: Plan, decision: Any) -> Plan | None:
    """The plan that an earlier process has decided for; None where there is none, or it does not
    serve any more."""
    if not isinstance(decision, Mapping):
        return None
    precision, rows = decision.get("chosen"), decision.get("candidates")
    if precision not in ("fp32", "fp16", "bf16", "int8") or not isinstance(rows, list):
        return None
    if not all(map(_is_row, rows)):
        return None
    plan = own if precision == own.precision else _built(job, precision)
    if plan is not own and plan.served is None:
        return None
    plan.candidates = rows
    return plan


def _chosen(job: Job, own: Plan, samples: Samples | None) -> Plan:
    """Build the other candidates, measure, and decide."""
    others = ["fp16", "bf16"] if job.own_precision == "fp32" else []
    if samples is not None:
        others.append("int8")
    plans = {job.own_precision: own}
    for precision in bar(others, "auto", job.options):
        plans[precision] = _built(job, precision)
    rows = {precision: _row(precision, plan) for precision, plan in plans.items()}
    fit = {p: plan for p, plan in plans.items() if _admitted(job, plan, samples, rows[p])}
    best = _fastest(job, fit, rows)
    for precision, row in rows.items():
        row["chosen"] = precision == best
        if row["chosen"]:
            row["why"] = None
    plan = plans[best or job.own_precision]
    plan.candidates = list(rows.values())
    return plan


def _row(precision: str, plan: Plan) -> Row:
    row: Row = {"precision": precision, "runs_in": plan.precision_run, "error": plan.error}
    return {**row, "p99": None, "seconds": None, "speedup": None, "bytes": plan.bytes, "why": None}


def _is_row(stored: Any) -> bool:
    """Whether a row out of a manifest, which others may have written, is one that reports show."""
    texts, numbers = ("precision", "runs_in", "why"), ("error", "p99", "seconds", "speedup")
    return (
        isinstance(stored, dict)
        and stored.keys() == {*texts, *numbers, "bytes", "chosen"}
        and all(isinstance(stored[name], str | None) for name in texts)
        and all(isinstance(stored[name], float | int | None) for name in (*numbers, "bytes"))
    )


def _admitted(job: Job, plan: Plan, samples: Samples | None, row: Row) -> bool:
    """Whether a candidate serves, runs in what it is called, and is exact enough."""
    if plan.served is None:
        row["why"] = plan.reason.message if plan.reason else None
    elif plan.warnings:
        row["why"] = plan.warnings[0].problem
    else:
        row["why"] = _inexact(job, plan, samples, row)
    return row["why"] is None


def _inexact(job: Job, plan: Plan, samples: Samples | None, row: Row) -> str | None:
    """Why a candidate is not exact enough on the samples held out (or on the example, where there
    are none); None where it is."""
    tensors, items = [job.tensors], [None]
    if samples is not None:
        fitting = [i for i in samples.held_out if _fits(samples.tensors[i], plan.pattern)]
        tensors = [list(samples.tensors[i]) for i in fitting] or tensors
        items = [samples.items[i] for i in fitting] or items
    assert plan.served is not None
    expected = [job.call_with(job.leaves_with(given)) for given in tensors]
    try:
        outputs = [plan.served.answer(given) for given in tensors]
        pairs = []
        for mine, other in zip(expected, outputs, strict=True):
            leaves, structure = flatten(mine)
            compare(leaves, structure, other, float("inf"))
            pairs.append((leaves, flatten(other)[0]))
    except (Mismatch, OutOfRangeError, EngineDead, ValueError) as error:
        return str(error)
    row["p99"] = sample_error(pairs)
    allowed = job.options.tolerance
    if callable(allowed):
        # In grad mode too it may do with them what it likes: ask for NumPy's view, say.
        told = ([_detached(y) for y in of] for of in (outputs, expected))
        return None if allowed(*told, items) else "the function of tolerance= says no"
    limit = job.options.tolerance_for("auto")
    return None if row["p99"] <= limit else f"off by {row['p99']:.2g} (allowed: {limit:.2g})"


def _detached(output: Any) -> Any:
    leaves, structure = flatten(output)
    return unflatten([x.detach() if isinstance(x, torch.Tensor) else x for x in leaves], structure)


def _fits(tensors: Sequence[torch.Tensor], pattern: Any) -> bool:
    pairs = zip(sizes_of(tensors), pattern, strict=True)
    return all(fits(mine, dims) for mine, dims in pairs)


def _fastest(job: Job, plans: Mapping[str, Plan], rows: Mapping[str, Row]) -> str | None:
    """The fastest, with a margin for the more exact, which come first."""
    ways = [_call_of(plan, job.tensors) for plan in plans.values()]
    if not ways:
        return None
    budget = min(_ROUNDS_SECONDS, job.seconds_left() / 4)
    times = dict(zip(plans, rounds(ways, budget, _FEWEST_ROUNDS), strict=True))
    best = next(iter(plans))
    first = times[best]
    for precision, spent in times.items():
        rows[precision]["seconds"] = statistics.median(spent)
        rows[precision]["speedup"] = _ratio(first, spent)
        if _ratio(times[best], spent) >= _MARGIN:
            best = precision
    for precision, spent in times.items():
        if precision != best:
            by = _ratio(spent, times[best])
            rows[precision]["why"] = f"{best} takes {1 / by:.2f} times as long"
    return best


def _call_of(plan: Plan, tensors: Sequence[torch.Tensor]) -> Any:
    served = plan.served
    assert served is not None
    return lambda: served.answer(tensors)


def _ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))
