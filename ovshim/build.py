"""The left road: from a module and an example to a plan.

    fingerprint → entry in the cache
        hit:   guards hold? → compile → one small proof
        miss:  look at eager → capture → publish → compile → proof
    → race → plan

Whatever goes wrong on the way becomes a plan that eager serves, with the reason.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ovshim import early, pages, proof, runtime
from ovshim.assemble import (
    eager_of,
    eager_plan,
    engine_of,
    generation_of,
    plan_of,
    served_by,
)
from ovshim.building import own_modes
from ovshim.cache import Entry, StoreError
from ovshim.capture import TRACE_LOCK, Captured, CaptureError, Request, capture
from ovshim.child import try_in_child
from ovshim.errors import OptionError
from ovshim.fingerprint import Unkeyable, fingerprint
from ovshim.floats import in_fp32, may_be_refused
from ovshim.generation import Generation
from ovshim.hit import from_cache
from ovshim.infer import EngineDead
from ovshim.job import MOVED, BuildStopped, Job, versions
from ovshim.kept import head_of, keep_compiled, keep_verdict
from ovshim.lowering import lowered, lowering_of, refuse_overflow
from ovshim.plan import Plan, Served
from ovshim.preflight import Look, used_up
from ovshim.proof import DiedOfSizesError, ProofFailedError
from ovshim.reasons import reason
from ovshim.record import LADDER, Record, Rung
from ovshim.signature import Kind, sizes_of
from ovshim.trial import seen_twice
from ovshim.wanted import own_dtype

__all__ = ["build", "is_cached"]

log = logging.getLogger("ovshim")

_PATIENCE_SECONDS = 2.0
# Said of a module that stays as it is; where it was changed meanwhile they mean nothing.
_OF_ONE_MODULE = frozenset(
    {"nondeterministic", "proof-failed", "capture-failed", "compile-failed", "infer-failed"}
)


def build(job: Job) -> Plan:
    """The plan for a job. Never raises but for KeyboardInterrupt and its like, and OptionError for
    calibration data that is none."""
    with own_modes(job.grad):
        try:
            plan = _build(job)
        except BuildStopped as stopped:
            why = stopped.reason
            if why.code in _OF_ONE_MODULE and job.weights_moved():
                # Two answers were of two modules: it says nothing of either.
                why = MOVED
            plan = eager_plan(job, why)
            plan.trouble = _without_frames(stopped.__cause__)
        except OptionError:
            raise
        except Exception as error:  # a fault of ours must not become one of the user's program
            log.debug("the build failed", exc_info=True)
            plan = eager_plan(job, reason("build-failed", f"{type(error).__name__}: {error}"))
    name = type(job.module).__qualname__
    spent = time.perf_counter() - job.started
    code = f" ({plan.reason.code})" if plan.reason else ""
    log.info(
        "%s.%s: %s%s in %.2f s, cache %s", name, job.method, plan.path, code, spent, plan.cache
    )
    return plan


def _without_frames(error: BaseException | None) -> BaseException | None:
    """The error, to be kept: its frames would keep whatever the program has in its own."""
    chain = error
    while chain is not None:
        chain.__traceback__ = None
        chain = chain.__cause__ or chain.__context__
    return error


def is_cached(job: Job) -> bool:
    """Whether there are entries for a module like the job's. Raises whatever a build meets."""
    job.lowering = lowering_of(job)
    family, _ = _family(job)
    return family is not None and bool(job.store.entries(family))


def _build(job: Job) -> Plan:
    _refuse_at_sight(job)
    job.lowering = lowering_of(job)
    with job.stage("fingerprint"):
        if job.ahead is None:
            there = any(plan.served is not None for plan in job.siblings)
            job.ahead = early.begin(job, there) if job.awaited else early.Ahead()
        family, trouble = _family(job)
    if family is None:
        log.info("%s is not cached: %s", type(job.module).__qualname__, trouble)
        return _from_capture(job, None)
    if job.ahead.died == family or job.store.died_building(family):
        _try_in_child(job, family)
    with job.store.marked(family):
        return from_cache(job, family) or _alone(job, family)


def _alone(job: Job, family: str) -> Plan:
    # Whoever else builds the same thing is waited for: its entry is then a hit. But not long by who
    # has a call to answer; eager does, and looks again some calls later.
    seconds = min(_PATIENCE_SECONDS, job.seconds_left()) if job.hurried else job.seconds_left()
    began = time.perf_counter()
    with job.store.lock(family, timeout=seconds, meanwhile=job.check_time) as held:
        # Without a lock at once: there are none here.
        if not held and job.hurried and time.perf_counter() - began >= seconds:
            raise BuildStopped(reason("building", "somebody else makes the same"))
        return _from_cache_or_capture(job, family)


def _from_cache_or_capture(job: Job, family: str) -> Plan:
    found = from_cache(job, family)
    if found is None:
        found = _from_other_mode(job)
    if found is not None:
        return found
    job.note_details()
    try:
        return _from_capture(job, family)
    except BuildStopped as stopped:
        keep_verdict(job, family, stopped.reason)
        raise


def _from_other_mode(job: Job) -> Plan | None:
    """A plan over the graph that was captured in the other grad mode, where it is the same."""
    if job.fingerprint is None or job.lowering is not None:  # int8 is proved by data of its own
        return None
    parts = {**job.fingerprint.parts, "inputs": _inputs(job, job.kind.without_grad(), not job.grad)}
    return from_cache(job, dataclasses.replace(job.fingerprint, parts=parts).key, other_mode=True)


def _try_in_child(job: Job, family: str) -> None:
    """An earlier process died in this build. A child goes first: if it dies of it too, nobody
    tries again; if not, what it has built is there."""
    log.info("%s: an earlier build ended its process", type(job.module).__qualname__)
    # Both are held for the child: it could not get the first from a thread that waits for the
    # second, which no other thread may hold when the process forks.
    with (
        job.store.lock(family, timeout=job.seconds_left(), meanwhile=job.check_time),
        TRACE_LOCK,
    ):
        outcome = try_in_child(lambda: _from_cache_or_capture(job, family), job.seconds_left())
    if outcome == "crashed":
        why = reason("crashed-before")
        keep_verdict(job, family, why)
        raise BuildStopped(why)
    job.check_time()


def _refuse_at_sight(job: Job) -> None:
    for name, tensor in [*job.module.named_parameters(), *job.module.named_buffers()]:
        if not tensor.is_cpu:
            raise BuildStopped(reason("not-on-cpu", f"{name} is on {tensor.device}"))
        if tensor.is_inference():
            raise BuildStopped(reason("untracked-weights", name))
    if _is_sharded(job.module):
        raise BuildStopped(reason("untracked-weights", "FSDP gathers them anew for each call"))
    why = used_up(job.module)
    if why is not None:
        raise BuildStopped(why)
    doubles = [own_dtype(job.module), *(tensor.dtype for tensor in job.tensors)]
    if job.options.precision is None and torch.float64 in doubles:
        raise BuildStopped(reason("double-precision"))


def _is_sharded(module: nn.Module) -> bool:
    """Whether `torch.distributed.fsdp.fully_shard` was applied: it writes gathered weights behind
    torch's back, to tensors that look untouched."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in module.modules())


def _family(job: Job) -> tuple[str | None, str | None]:
    """The key of the job, or None and why it has none."""
    if not job.store.enabled:
        return None, job.store.problem or "the cache is off"
    decisive = {
        "device": job.options.device,
        "lowering": None if job.lowering is None else job.lowering.key,
        "precision": job.precision,
        "properties": dict(job.options.properties),
        "tolerance": job.tolerance,
    }
    try:
        found = fingerprint(
            job.module,
            job.method,
            inputs=_inputs(job, job.kind, job.grad),
            options=json.dumps(decisive, sort_keys=True),
            environment=versions(),
        )
    except Unkeyable as unkeyable:
        return None, str(unkeyable)
    job.fingerprint = found
    return found.key, None


def _inputs(job: Job, kind: Kind, grad: bool) -> str:
    """The kind of the calls, and which weights gradients are recorded for: torch takes other ways
    where there are none."""
    recorded = "".join("01"[p.requires_grad] for p in job.module.parameters()) if grad else "off"
    return json.dumps({"kind": str(kind), "grad": recorded})


# --- a miss -----------------------------------------------------------------------------------


def _from_capture(job: Job, family: str | None) -> Plan:
    with job.stage("preflight"):
        seen = seen_twice(job)
    if seen.reason is not None:
        trained = [name for name, inner in job.module.named_modules() if inner.training]
        by_training = trained and seen.reason.code in ("random", "mutates-buffer")
        raise BuildStopped(reason("training", trained[0]) if by_training else seen.reason)
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
        captured = _captured(job, rung, _wanted(seen))
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
        source, entry, keep = _publish(job, family, captured, record)
    # From here on the graph is a file: torch's weights and OpenVINO's share nothing.
    del captured
    pages.trim()
    with job.proving(entry):
        served, record = _served_and_proved(job, source, record, entry, generation, seen)
        weakref.finalize(served.engine, keep)
    if entry is not None:
        found_out = {**record.proof(job.precision), "seconds": dict(job.seconds)}
        entry = job.store.amend(entry, "proof", found_out)
        keep_compiled(job, entry)
        if job.in_range is not None:
            entry = job.store.amend(entry, "in_range", [job.in_range])
    return plan_of(job, served, record, generation, "off" if entry is None else "miss", entry)


def _captured(job: Job, rung: Rung, outputs: tuple[int, ...]) -> Captured:
    dims = {
        "asked": job.dynamic,
        "all": tuple(frozenset(range(tensor.dim())) for tensor in job.tensors),
        "none": tuple(frozenset[int]() for _ in job.tensors),
    }[rung.sizes]
    try:
        marked = job.lowering is not None and job.lowering.marked
        request = Request(job.module, job.call, job.kind, job.copies(), dims, outputs, marked)
        return capture(request)
    except CaptureError as refused:
        raise BuildStopped(refused.reason) from refused


def _fold(captured: Captured) -> None:
    try:
        runtime.fold(captured.model)
    except RuntimeError as error:
        detail = str(error).strip().splitlines()[-1][:200]
        raise BuildStopped(reason("compile-failed", detail)) from error


def _wanted(seen: Look) -> tuple[int, ...]:
    """The output leaves that a graph should compute: each tensor once that is not an input, and
    the numbers, which may depend on sizes."""
    first: dict[int, int] = {}
    for i, leaf in enumerate(seen.leaves):
        if isinstance(leaf, torch.Tensor) and seen.given[i] is None:
            first.setdefault(id(leaf), i)
    numbers = [i for i, leaf in enumerate(seen.leaves) if type(leaf) is int]
    return tuple(sorted([*first.values(), *numbers]))


def _publish(
    job: Job, family: str | None, captured: Captured, record: Record
) -> tuple[Path, Entry | None, Callable[[], None]]:
    """Write the graph to a file: in the cache, or, where that cannot be, in a directory of our
    own. Returns the IR, its entry, and what lets go of the file when it is not needed any more.
    """

    def write(directory: Path) -> None:
        # Not compressed: fp16 weights would be off by 2e-3 on a BERT.
        target = str(directory / "model.xml")
        runtime.openvino().save_model(captured.model, target, compress_to_fp16=False)
        job.keep_details(directory)

    if family is not None:
        try:
            entry = job.store.publish(family, record.variant(job.kind), write, head_of(job, record))
            lease = job.store.hold(entry)
            if lease is not None:
                return entry.file("model.xml"), entry, lease.release
        except StoreError as error:
            log.warning("%s is not cached: %s", type(job.module).__qualname__, error)
    directory = tempfile.TemporaryDirectory(prefix="ovshim-", ignore_cleanup_errors=True)
    write(Path(directory.name))
    return Path(directory.name) / "model.xml", None, directory.cleanup


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
                eager = eager_of(job)
                found = proof.prove(eager, served, job.tensors, *sizes, job.check_time, samples)
        except DiedOfSizesError as died:
            log.info("%s: %s", type(job.module).__qualname__, died)
            record = record.pin(died.places, sizes_of(job.leaves))
        except ProofFailedError as failed:
            if not may_be_refused(job, job.hint):
                raise BuildStopped(reason("proof-failed", str(failed))) from failed
            log.info("%s, its rest in bf16: %s", type(job.module).__qualname__, failed)
            rest = in_fp32(job, record.rest, entry)
            record = dataclasses.replace(record, rest=rest)
        except EngineDead as dead:
            raise BuildStopped(reason("infer-failed", str(dead))) from dead
        else:
            return served, record.proved(found, sizes_of(job.leaves), job.hint)
