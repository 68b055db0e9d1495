"""A miss: a graph captured from the module, published, compiled, and proved in full."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from pathlib import Path

import torch

from ovshim import pages, proof, runtime
from ovshim.assemble import eager_of, engine_of, generation_of, limits_of, plan_of, served_by
from ovshim.cache import Entry
from ovshim.capture import TRACE_LOCK, Captured, CaptureError, Request, capture
from ovshim.floats import in_fp32, may_be_refused
from ovshim.generation import Generation
from ovshim.infer import EngineDead
from ovshim.job import BuildStopped, Job
from ovshim.kept import head_of, keep_compiled, published
from ovshim.lowering import lowered, refuse_overflow
from ovshim.plan import Plan, Served
from ovshim.preflight import Look
from ovshim.proof import DiedOfSizesError, NotTakenError, ProofFailedError
from ovshim.reasons import reason
from ovshim.record import LADDER, Record, Rung
from ovshim.shortage import SHORTAGE, compile_failure
from ovshim.signature import sizes_of
from ovshim.trial import seen_twice

__all__ = ["from_capture"]

log = logging.getLogger("ovshim")


def from_capture(job: Job, family: str | None) -> Plan:
    """A plan over a graph that is captured now, and kept under its family.

    Raises:
        BuildStopped: it does not come to a plan that is proved.
    """
    with job.stage("preflight"):
        seen = seen_twice(job)
    if seen.reason is not None:
        trained = [name for name, inner in job.module.named_modules() if inner.training]
        by_training = trained and seen.reason.code in ("random", "mutates-buffer")
        raise BuildStopped(reason("training", trained[0]) if by_training else seen.reason)
    if job.may_overflow:
        with job.stage("preflight"):
            job.in_range = refuse_overflow(job)
    dtypes = [leaf.dtype for leaf in seen.leaves if isinstance(leaf, torch.Tensor)]
    if job.options.precision is None and torch.float64 in dtypes:
        raise BuildStopped(reason("double-precision"))
    if not any(isinstance(seen.leaves[i], torch.Tensor) for i in _wanted(seen)):
        raise BuildStopped(reason("capture-failed", "no output is a tensor that is computed"))
    first: BuildStopped | None = None
    for rung in LADDER:
        if rung.properties and first is not None and first.reason.code == "compile-failed":
            continue  # how a graph is run does not make it compile
        try:
            return _climb(job, family, seen, rung)
        except BuildStopped as stopped:
            if stopped.reason.code == SHORTAGE:
                raise  # not `first`, which is kept: this rung might have cured it
            if stopped.reason.code not in ("proof-failed", "compile-failed", "infer-failed"):
                raise first or stopped from None
            log.info("%s, %s: %s", type(job.module).__qualname__, rung.name or "as is", stopped)
            # The reason to show is what the usual way met; retries add nothing to it.
            first = first or stopped
            if job.lowering is not None and job.lowering.samples is not None:
                break  # it is int8 that is not exact enough, and no other way of building is
    assert first is not None
    raise first


def _climb(job: Job, family: str | None, seen: Look, rung: Rung) -> Plan:
    """Build by one rung.

    Raises:
        BuildStopped: it does not come to a plan that is proved.
    """
    with job.stage("capture"), TRACE_LOCK:
        captured = _captured(job, rung, seen)
        record = Record.of_capture(captured, seen.leaves, rung, job.dynamic)
        guards = proof.tied(record.pattern, record.size_guards, sizes_of(job.leaves))
        record = dataclasses.replace(record, size_guards=guards)
        generation = generation_of(job, record)
        # What eager and the tracer have used: folding a graph takes as much as its weights.
        pages.trim()
    if job.lowering is not None:
        with job.stage("lower"):
            captured, told = lowered(job, captured)
            record = dataclasses.replace(record, lowered=told)
    else:
        with job.stage("capture"):
            _fold(captured)
    with job.stage("capture"):
        named = None if family is None else (family, record.variant(job.kind), head_of(job, record))
        source, entry, let_go = published(job, captured.model, named)
    # From here on the graph is a file: torch's weights and OpenVINO's share nothing.
    del captured
    pages.trim()
    with job.proving(entry, let_go):
        served, record = _served_and_proved(job, source, record, entry, generation, seen)
        weakref.finalize(served.engine, let_go)
    if entry is not None:
        found_out = {**record.proof(job.precision), "seconds": dict(job.seconds)}
        entry = job.store.amend(entry, "proof", found_out)
        keep_compiled(job, entry)
        if job.in_range is not None:
            entry = job.store.amend(entry, "in_range", [job.in_range])
    return plan_of(job, served, record, generation, "off" if entry is None else "miss", entry)


def _captured(job: Job, rung: Rung, seen: Look) -> Captured:
    dims = {
        "asked": job.dynamic,
        "all": tuple(frozenset(range(tensor.dim())) for tensor in job.tensors),
        "none": tuple(frozenset[int]() for _ in job.tensors),
    }[rung.sizes]
    try:
        marked = job.lowering is not None and job.lowering.marked
        request = Request(
            module=job.module,
            call=job.call,
            kind=job.kind,
            leaves=job.copies(),
            dynamic=dims,
            outputs=_wanted(seen),
            marked=marked,
            overlaps=seen.overlaps,
        )
        return capture(request)
    except CaptureError as refused:
        raise BuildStopped(refused.reason) from refused


def _fold(captured: Captured) -> None:
    try:
        runtime.fold(captured.model)
    except RuntimeError as error:
        raise BuildStopped(compile_failure(error)) from error


def _wanted(seen: Look) -> tuple[int, ...]:
    """The output leaves that a graph should compute: each tensor once that is not an input, and
    the numbers, which may depend on sizes."""
    first: dict[int, int] = {}
    for i, leaf in enumerate(seen.leaves):
        if isinstance(leaf, torch.Tensor) and seen.given[i] is None:
            first.setdefault(id(leaf), i)
    numbers = [i for i, leaf in enumerate(seen.leaves) if type(leaf) is int]
    return tuple(sorted([*first.values(), *numbers]))


def _served_and_proved(
    job: Job,
    source: Path,
    record: Record,
    entry: Entry | None,
    generation: Generation,
    seen: Look,
) -> tuple[Served, Record]:
    """The graph compiled and proved; where it dies of a size, that is pinned and both done anew."""
    samples = [] if job.lowering is None else job.lowering.to_prove_with(record.pattern)
    while True:
        with job.stage("compile"):
            engine = engine_of(job, source, record, entry)
        try:
            with job.stage("proof"):
                served = served_by(job, engine, record, generation, seen, job.copies())
                sizes = (record.pattern, record.size_guards)
                eager = eager_of(job, record.views)
                found = proof.prove(eager, served, job.tensors, *sizes, job.check_time, samples)
        except DiedOfSizesError as died:
            log.info("%s: %s", type(job.module).__qualname__, died)
            record = record.pin(died.places, sizes_of(job.leaves))
        except NotTakenError as refused:
            raise BuildStopped(reason("out-of-range", str(refused))) from refused
        except ProofFailedError as failed:
            if not may_be_refused(job, job.hint):
                raise BuildStopped(reason("proof-failed", str(failed))) from failed
            log.info("%s, its rest in bf16: %s", type(job.module).__qualname__, failed)
            rest = in_fp32(job, record.rest, entry)
            record = dataclasses.replace(record, rest=rest)
        except EngineDead as dead:
            raise BuildStopped(reason("infer-failed", str(dead))) from dead
        else:
            return served, record.proved(found, sizes_of(job.leaves), job.ran_as, limits_of(job))
