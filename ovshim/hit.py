"""A hit: a plan out of an entry of the cache, proved again on one small input."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ovshim import blobs, early, intraop, proof
from ovshim.answered import keep_answer
from ovshim.assemble import (
    eager_of,
    eager_plan,
    engine_of,
    generation_of,
    limits_of,
    plan_of,
    served_by,
)
from ovshim.cache import Entry
from ovshim.eager import Eager
from ovshim.early import Early
from ovshim.errors import OptionError
from ovshim.generation import Generation, GuardFailedError
from ovshim.infer import Engine, EngineDead
from ovshim.inputs import small_leaves
from ovshim.job import MOVED, BuildStopped, Job
from ovshim.kept import holds_here, keep_compiled, keep_data, known_data
from ovshim.plan import Plan, Served
from ovshim.preflight import Look
from ovshim.proof import DiedOfSizesError, NotTakenError, ProofFailedError
from ovshim.reasons import reason
from ovshim.record import Record
from ovshim.shortage import SHORTAGE, compile_failure
from ovshim.signature import sizes_of
from ovshim.trial import settled, trial
from ovshim.values import holds_nan

__all__ = ["from_cache"]

log = logging.getLogger("ovshim")

# They say nothing of an entry.
_PASSING = frozenset({"build-too-slow", "building", SHORTAGE})

# What an engine was given, and what it has computed.
_Known = tuple[list[torch.Tensor], list[torch.Tensor]]


class _DamagedError(Exception):
    """The entry is not what was written. The store has set it aside."""


def from_cache(job: Job, family: str, other_mode: bool = False) -> Plan | None:
    """A plan out of an entry that fits the job; None where there is none.

    Args:
        other_mode: whether the family is of calls with grad mode switched over.
    """
    for entry in _candidates(job, family):
        if "proof" not in entry.manifest and "verdict" not in entry.manifest:
            continue  # somebody is about to prove it, or has died of that
        try:
            plan = _if_it_fits(job, entry, other_mode)
        except BuildStopped:
            raise
        except Exception:  # of a manifest or a graph that is not as we write them: a miss
            log.info("the entry %s does not serve", entry.path, exc_info=True)
            if not other_mode:
                job.store.discard(entry)
            continue
        if plan is not None:
            return plan
    return None


def _candidates(job: Job, family: str) -> Iterator[Entry]:
    """The family's entries, sound ones; the others are not read if the first serves."""
    begun = job.ahead.early
    first = None if begun is None else begun.entry
    if first is not None and first.family == family:
        yield first
    for entry in job.store.entries(family):
        # Where that was damaged another one may have its place by now.
        if first is None or _told_of(entry) != _told_of(first):
            yield entry


def _told_of(entry: Entry) -> tuple[Any, ...]:
    return entry.path, entry.manifest["files"]


def _if_it_fits(job: Job, entry: Entry, other_mode: bool) -> Plan | None:
    record = Record.of_entry(entry, job.kind)
    if other_mode and (record.verdict is not None or not record.any_mode):
        return None
    if not record.fits(sizes_of(job.leaves)):
        job.open_sizes(record.pattern, record.pinned)
        return None
    if record.verdict is None and not record.opens(job.dynamic):
        return None  # it was built for fewer sizes than this job is told to keep open
    return _from_entry(job, entry, record, other_mode)


def _from_entry(job: Job, entry: Entry, record: Record, other_mode: bool) -> Plan | None:
    try:
        generation = generation_of(job, record)
    except GuardFailedError as failed:
        log.debug("the entry %s is for something else: %s", entry.path, failed)
        return None
    if record.verdict is not None:
        if not holds_here(record.processor, job):
            return None
        return eager_plan(job, record.verdict, entry, record.pattern)
    lease = job.store.hold(entry)
    if lease is None:
        return None
    try:
        served, record, entry, known = _proved(job, entry, record, generation, other_mode)
    except _DamagedError:
        lease.release()
        return None
    except (BuildStopped, ProofFailedError, DiedOfSizesError, EngineDead) as trouble:
        lease.release()
        _does_not_serve(job, entry, other_mode, trouble)
        return None
    try:
        if job.may_overflow:
            _refuse_overflow(job, entry)
    except BaseException:
        lease.release()
        raise
    weakref.finalize(served.engine, lease.release)
    keep_compiled(job, entry)
    plan = plan_of(job, served, record, generation, "hit", entry)
    # Not behind a call: what the program gives next will be something else.
    if known is not None and plan.path == "openvino" and not job.lenient:
        keep_answer(served.engine, *known)
    return plan


def _proved(
    job: Job, entry: Entry, record: Record, generation: Generation, other_mode: bool
) -> tuple[Served, Record, Entry, _Known | None]:
    """What serves by an entry, compared with eager; what is known of it by now; and what it was
    given and has computed, if that is at hand.

    Raises:
        BuildStopped, ProofFailedError, DiedOfSizesError, EngineDead, _DamagedError.
    """
    shared = _engine_of_sibling(job, entry)
    if shared is None and (job.ahead.early is None or job.ahead.early.entry is not entry):
        early.begin_with(job, entry, record)
    begun = job.ahead.early
    small, seen = _looked_beside(job, record, begun)
    if begun is not None and begun.entry is entry and not begun.is_sound():
        raise _DamagedError
    with job.stage("compile"):
        engine = shared or engine_of(job, entry.file("model.xml"), record, entry)
    with job.stage("proof"):
        served = served_by(job, engine, record, generation, seen, small)
        tensors = [leaf for leaf in small if isinstance(leaf, torch.Tensor)]
        eager = eager_of(job, record.views)
        computed = None if begun is None else begun.answer(small)
        answer = served.answer if computed is None else _answer_of(served, computed)
        error = _error_of(job, eager, served, answer, tensors, seen)
        if other_mode:
            error = max(error, proof.prove_values(eager, served, job.tensors, job.check_time))
        if job.hint != "fp32" and job.ran_as not in record.proved_in:
            record, entry = _wholly_proved(job, served, record, entry)
    if job.weights_moved():
        raise BuildStopped(MOVED)
    known = None if computed is None else ([small[i] for i in job.kind.distinct], computed)
    return served, dataclasses.replace(record, error=max(error, record.error)), entry, known


def _error_of(
    job: Job,
    eager: Eager,
    served: Served,
    answer: Callable[[Sequence[torch.Tensor]], Any],
    small: Sequence[torch.Tensor],
    seen: Look,
) -> float:
    """The error on a small input, or on the example, where a mask that was cut hides all there is.

    Raises:
        ProofFailedError: see `proof.prove_small`.
    """
    try:
        return proof.prove_small(eager, answer, small, seen)
    except NotTakenError:
        if sizes_of(small) == sizes_of(job.tensors):
            raise
        return proof.prove_values(eager, served, job.tensors, job.check_time, draws=1)


def _does_not_serve(job: Job, entry: Entry, other_mode: bool, trouble: Exception) -> None:
    """Let go of an entry that does not prove here, which an older processor, driver or torch may
    have left: it is built anew. Raises BuildStopped where that would be no better."""
    if job.weights_moved():  # the entry is as good as before
        raise BuildStopped(MOVED) from None
    code = trouble.reason.code if isinstance(trouble, BuildStopped) else ""
    if code in _PASSING or (code == "eager-refuses" and _is_refused(job)):
        raise trouble
    if isinstance(trouble, EngineDead) and (why := compile_failure(trouble)).code == SHORTAGE:
        raise BuildStopped(why) from trouble
    log.info("the entry %s does not serve: %s", entry.path, trouble)
    if isinstance(trouble, ProofFailedError) and job.may_overflow:
        _refuse_overflow(job, entry)  # where kernels of float16 run, that alone may be the cause
    if isinstance(trouble, NotTakenError):
        raise BuildStopped(reason("out-of-range", str(trouble))) from trouble
    if isinstance(trouble, ProofFailedError) and holds_nan(job.leaves):
        raise BuildStopped(reason("special-values")) from trouble  # others have better examples
    if other_mode:
        return
    if job.imported:
        blobs.discard(job.store, entry, job.options.device, job.settings)
    job.store.discard(entry)


def _is_refused(job: Job) -> bool:
    """Whether eager refuses the example itself, and not only at the entry's sizes: one bad input
    must not cost others what they have."""
    try:
        trial(job)
    except Exception as error:  # whatever the user's module raises
        log.debug("eager refuses the example: %s", error)
        return True
    return False


def _engine_of_sibling(job: Job, entry: Entry) -> Engine | None:
    """The engine that runs the entry's graph in the other grad mode; None where there is none."""
    for plan in job.siblings:
        served, graph = plan.served, plan.graph
        if plan.cache_path != str(entry.path) or served is None or graph is None:
            continue
        if served.engine.dead is None:
            job.source, job.hint, job.way = graph.source, graph.hint, plan.way
            job.precision_run, job.modules_run = plan.precision_run, plan.modules
            job.warnings = plan.warnings
            return served.engine
    return None


def _wholly_proved(job: Job, served: Served, record: Record, entry: Entry) -> tuple[Record, Entry]:
    """Both with a proof like that of a build: it was made of what ran in another precision, on
    another processor, with fewer threads or while the machine was busy.

    Raises:
        ProofFailedError, DiedOfSizesError: see `proof.prove`.
    """
    samples = [] if job.lowering is None else job.lowering.to_prove_with(record.pattern)
    sizes = (record.pattern, record.size_guards)
    found = proof.prove(
        eager_of(job, record.views), served, job.tensors, *sizes, job.check_time, samples
    )
    record = record.proved(found, sizes_of(job.leaves), job.ran_as, limits_of(job))
    kept = {**entry.manifest["proof"], **record.proof(job.precision)}
    return record, job.store.amend(entry, "proof", kept)


def _refuse_overflow(job: Job, entry: Entry) -> None:
    """Raise BuildStopped where this job's data leaves float16's range, which the data that the
    entry was proved with may not have done. What does not is kept, to be looked at once."""
    from ovshim.lowering import refuse_overflow

    known = known_data(entry)
    try:
        with job.stage("proof"):
            data = refuse_overflow(job, known)
    except (BuildStopped, OptionError):
        raise
    except Exception as error:  # whatever the user's module raises
        raise BuildStopped(reason("eager-refuses", f"{type(error).__name__}: {error}")) from error
    keep_data(job, entry, data)


def _looked_beside(job: Job, record: Record, begun: Early | None) -> tuple[list[Any], Look]:
    """As `_looked_small`, in the time that OpenVINO leaves which has begun already.

    The threads of both wait for each other by spinning: side by side they take half as long again
    as one after the other. A single one of eager's does not, and of two processors OpenVINO needs
    little more than one to compile (BERT-base on two threads: 0.05 s less); its first call, which
    packs weights, shares them well too (ResNet-50: 0.01 s less). When OpenVINO is done, eager takes
    both.
    """
    working = begun is not None and not begun.is_over()
    if begun is None or not (working and torch.get_num_threads() == 2 and intraop.can_be_one()):
        _wait(job, begun)
        with job.stage("proof"):
            return _looked_small(job, record)
    try:
        with job.stage("proof"), intraop.one_thread(begun.is_over):
            return _looked_small(job, record)
    finally:
        _wait(job, begun)


def _wait(job: Job, begun: Early | None) -> None:
    if begun is not None:
        with job.stage("compile"):
            begun.wait()


def _looked_small(job: Job, record: Record) -> tuple[list[Any], Look]:
    """A small input, and one look at what eager makes of it: that at the call of the user's, where
    it was this."""
    small = small_leaves(job.kind, job.leaves, record.pattern, record.sizes)
    if job.look is not None and job.look.reason is None and sizes_of(small) == sizes_of(job.leaves):
        return small, job.look
    try:
        seen = trial(job, small)
        if seen.reason is not None and seen.reason.code in ("random", "mutates-buffer"):
            seen = trial(job, small)  # another thread may have drawn, or written
        if seen.reason is not None and seen.reason.code == "mutates-attribute":
            seen = settled(job) or seen
            seen = seen if seen.reason is not None else trial(job, small)
    except BuildStopped:
        raise
    except Exception as error:  # whatever the user's module raises
        raise BuildStopped(reason("eager-refuses", f"{type(error).__name__}: {error}")) from error
    if seen.reason is not None:
        raise BuildStopped(seen.reason)
    return small, seen


def _answer_of(
    served: Served, computed: list[torch.Tensor]
) -> Callable[[Sequence[torch.Tensor]], Any]:
    """What answers as OpenVINO has done already."""
    # A copy, for what records gradients writes to it.
    return lambda given: served.builder(served.in_range(list(computed)), given)
