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
import time
from itertools import chain

import torch
from torch import nn

from ovshim import early
from ovshim.assemble import eager_plan
from ovshim.attributes import tensors_of
from ovshim.building import own_modes
from ovshim.errors import OptionError
from ovshim.fingerprint import Unkeyable, fingerprint
from ovshim.hit import from_cache
from ovshim.job import MOVED, BuildStopped, Job, versions
from ovshim.kept import is_of_nan, keep_verdict
from ovshim.plan import Plan
from ovshim.preflight import used_up
from ovshim.reasons import reason
from ovshim.shortage import build_failure
from ovshim.signature import Kind
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
            elif is_of_nan(job, why):
                why = reason("special-values")
            plan = eager_plan(job, why)
            plan.trouble = _without_frames(stopped.__cause__)
        except OptionError:
            raise
        except Exception as error:  # a fault of ours must not become one of the user's program
            log.debug("the build failed", exc_info=True)
            plan = eager_plan(job, build_failure(error))
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
    _lower(job)
    family, _ = _family(job)
    return family is not None and bool(job.store.entries(family))


def _build(job: Job) -> Plan:
    _refuse_at_sight(job)
    _lower(job)
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


def _from_capture(job: Job, family: str | None) -> Plan:
    # Not before: a hit needs nothing of a capture.
    from ovshim.miss import from_capture

    return from_capture(job, family)


def _lower(job: Job) -> None:
    """Find what is to be made of the job's graph. Raises: see `lowering.lowering_of`."""
    if job.lowers:
        from ovshim.lowering import lowering_of

        job.lowering = lowering_of(job)


def _from_other_mode(job: Job) -> Plan | None:
    """A plan over the graph that was captured in the other grad mode, where it is the same."""
    if job.fingerprint is None or job.lowering is not None:  # int8 is proved by data of its own
        return None
    parts = {**job.fingerprint.parts, "inputs": _inputs(job, job.kind.without_grad(), not job.grad)}
    return from_cache(job, dataclasses.replace(job.fingerprint, parts=parts).key, other_mode=True)


def _try_in_child(job: Job, family: str) -> None:
    """An earlier process died in this build. A child goes first: if it dies of it too, nobody
    tries again; if not, what it has built is there."""
    from ovshim.capture import TRACE_LOCK

    log.info("%s: an earlier build ended its process", type(job.module).__qualname__)
    if job.ahead.early is not None:
        job.ahead.early.wait()  # another graph's: OpenVINO is not to be at work when we fork
    # Both are held for the child: it could not get the first from a thread that waits for the
    # second, which no other thread may hold when the process forks.
    with (
        job.store.lock(family, timeout=job.seconds_left(), meanwhile=job.check_time),
        TRACE_LOCK,
    ):
        outcome = job.tried_in_child(lambda: _from_cache_or_capture(job, family))
    if outcome == "crashed":
        why = reason("crashed-before")
        keep_verdict(job, family, why)
        raise BuildStopped(why)
    job.check_time()


def _refuse_at_sight(job: Job) -> None:
    for name, tensor in chain(*tensors_of(job.module)):
        if not tensor.is_cpu:
            raise BuildStopped(reason("not-on-cpu", f"{name} is on {tensor.device}"))
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise BuildStopped(reason("special-tensor", f"{name} of layout {tensor.layout}"))
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
