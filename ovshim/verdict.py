"""Whether a plan serves, size by size: it runs against eager once on each sort of machine, and what
was found is kept with the entry."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ovshim import runtime
from ovshim.buckets import Bucket, compile_bucket, compile_sizes
from ovshim.cache import Entry
from ovshim.deferred import later
from ovshim.eager import LOW_TOLERANCE
from ovshim.generation import Generation
from ovshim.helper import hot
from ovshim.job import Job
from ovshim.lanes import Lane
from ovshim.options import Options
from ovshim.plan import Plan
from ovshim.race import Finish, race
from ovshim.reasons import Reason, reason
from ovshim.record import Record
from ovshim.shortcut import raced
from ovshim.unmet import Unmet

__all__ = ["EntryNotes", "decide", "placed", "slower"]

# Sizes that are left open cost a small graph up to a fifth: what loses by no more may win without.
_NEAR = 1.25


class EntryNotes:
    """What is found out about a plan after its build, written to its entry by another thread.

    Processes that write at once may lose one another's notes; then something is looked at twice.
    """

    def __init__(self, job: Job, plan: Plan, entry: Entry, record: Record) -> None:
        self._store = job.store
        self._entry = entry
        self._grad = job.grad
        self._placed = placed(job.options, plan.generation)
        self._race = dict(record.race)
        self._met = [list(map(list, sizes)) for sizes in record.met]

    def met(self, sizes: Sequence[Sequence[int]]) -> None:
        """Calls of these sizes are answered rightly."""
        self._met.append(list(map(list, sizes)))
        self._write("met", list(self._met))

    def raced(self, bucket: Bucket, finish: Finish) -> None:
        """A race in this bucket came out so. What was not decided is run again by the next
        process, on a quieter machine perhaps."""
        if finish.decided:
            self._race[_where(bucket, self._grad, self._placed)] = finish.to_json()
            self._write("race", dict(self._race))

    def known_alone(self, sizes: Sequence[Sequence[int]]) -> Finish | None:
        """How the graph for these sizes alone has done against the open one."""
        return Finish.of_json(self._race.get(_alone(sizes, self._placed)))

    def raced_alone(self, sizes: Sequence[Sequence[int]], finish: Finish) -> None:
        """It has done so; the open one is the "eager" of the finish."""
        self._race[_alone(sizes, self._placed)] = finish.to_json()
        self._write("race", dict(self._race))

    def condemn(self, why: Reason) -> None:
        """The graph is wrong: eager serves from now on, in every process."""
        self._write("verdict", why.to_dict())

    def _write(self, section: str, value: Any) -> None:
        later(lambda: self._store.amend(self._entry, section, value))


def decide(
    job: Job,
    plan: Plan,
    record: Record,
    entry: Entry | None,
    add_exact: Callable[[float], Any],
) -> None:
    """Lay out the plan's lanes: all sizes that were proved are open if OpenVINO is preferred; else
    those that have won, and the example's sizes are raced now.

    Args:
        add_exact: lets the example's sizes have a graph of their own, where its calls take less
            than so many seconds.
    """
    plan.bucket, of_sizes = compile_bucket(record.pattern, record.size_guards)
    plan.key = plan.bucket
    plan.tolerance = LOW_TOLERANCE if job.tolerance is None else job.tolerance
    plan.raced = job.options.prefer == "faster"
    plan.notes = None if entry is None else EntryNotes(job, plan, entry, record)
    plan.lanes = {of_sizes(sizes): Lane(True, raced=not plan.raced) for sizes in record.met}
    if plan.raced:
        for bucket in plan.lanes:
            known = _known(job, plan, record, bucket)
            if known is not None:
                plan.lanes[bucket] = Lane(True, raced=True, eager=known.lost)
        plan.key = compile_sizes(record.pattern, record.size_guards)
        _race_example(job, plan, record, add_exact)
    plan.settle()


def _race_example(job: Job, plan: Plan, record: Record, add_exact: Callable[[float], Any]) -> None:
    """Who serves the example's sizes. A graph of their own is in a lane of its own: what wins by it
    says nothing of other sizes, which the open one would serve."""
    alone = _look_apart(job, plan)
    bucket = plan.bucket(job.tensors)
    finish = _known(job, plan, record, bucket)
    if finish is None:
        finish = _raced(job, plan, bucket)
        if finish.lost and not alone and finish.candidate < _NEAR * finish.eager:
            add_exact(finish.eager)
            if _look_apart(job, plan):
                plan.lanes[bucket] = Lane(True, raced=True, eager=True)
                bucket = plan.bucket(job.tensors)
                finish = _raced(job, plan, bucket)
    plan.medians = finish.eager, finish.candidate
    plan.speedup = finish.eager / finish.candidate
    plan.unmet = Unmet(plan.key(job.tensors), bucket, *plan.medians)
    plan.lanes[bucket] = Lane(True, raced=True, eager=finish.lost)
    if finish.lost:
        plan.reason = slower(finish)


def _look_apart(job: Job, plan: Plan) -> bool:
    """Give the example's sizes a bucket of their own, if they have a graph of their own."""
    assert plan.served is not None
    sizes = [job.leaves[i].shape for i in job.kind.distinct]
    if plan.served.engine.exact_sizes != sizes or not any(None in dims for dims in plan.pattern):
        return False
    bucket, key, own = plan.bucket, plan.key, plan.key(job.tensors)
    text = f"alone {list(map(list, sizes))}"
    plan.bucket = lambda tensors: text if key(tensors) == own else bucket(tensors)
    return True


def _known(job: Job, plan: Plan, record: Record, bucket: Bucket) -> Finish | None:
    """How the race in this bucket has come out, if it was run."""
    where = _where(bucket, job.grad, placed(job.options, plan.generation))
    return Finish.of_json(record.race.get(where))


def _raced(job: Job, plan: Plan, bucket: Bucket) -> Finish:
    """Eager and OpenVINO on the example, now."""
    args, kwargs = job.arguments()

    def candidate() -> Any:
        # All that a call pays for beyond eager's own way to the method.
        tensors = plan.match(args, kwargs)
        holds = plan.generation is not None and plan.generation.holds()
        if tensors is not None and plan.served and holds and plan.values_fit(tensors):
            plan.key(tensors)
            return plan.served.answer(tensors)
        return None

    with job.stage("race"), _fastest_mode(job, args, kwargs):
        candidate()
        ours = raced(plan, args, kwargs, otherwise=candidate)
        eager = functools.partial(job.call, *args, **kwargs)
        finish = race(eager, ours, job.race_seconds())
    if plan.notes is not None:
        plan.notes.raced(bucket, finish)
    return finish


def _fastest_mode(
    job: Job, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> contextlib.AbstractContextManager[Any]:
    """The mode that eager is fastest in, which the program may be in: `inference_mode`, where no
    gradients are recorded and the module takes it. A module of a few microseconds takes a tenth
    less in it than under `no_grad`.

    Whatever it keeps of these sizes it keeps in the mode it is called in first: a tensor made under
    `inference_mode` can never again be trained with."""
    if job.grad:
        return contextlib.nullcontext()
    try:
        job.call(*args, **kwargs)
        with torch.inference_mode():
            job.call(*args, **kwargs)
    except Exception:  # of one that records gradients inside, whatever it raises then
        return contextlib.nullcontext()
    return torch.inference_mode()


def slower(finish: Finish) -> Reason:
    """Why eager serves that has won so."""
    text = f"{finish.eager * 1e3:.3g} ms against {finish.candidate * 1e3:.3g} ms"
    return reason("slower", text)


def placed(options: Options, watched: Generation | None = None) -> str:
    """How a graph is placed on its device, for the key of a race, and whether values are watched,
    which every call pays for; nothing of what is usual."""
    hint = None if options.hint == "latency" else options.hint
    given = {"threads": options.threads, "streams": options.streams, "hint": hint}
    said = "".join(f" {name}={value}" for name, value in given.items() if value is not None)
    return f"{said} values" if watched is not None and watched.uncounted else said


def _where(bucket: Bucket, grad: bool, placed: str) -> str:
    """A race is valid on one sort of processor, for one number of threads (eager's), for like
    sizes, in one grad mode: recording takes eager's time, and ours; with the helper, or without."""
    mode = f"{' grad' if grad else ''}{'' if hot is None else ' helped'}"
    return f"{runtime.measured_on(torch.get_num_threads())}{placed} bucket={bucket}{mode}"


def _alone(sizes: Sequence[Sequence[int]], placed: str) -> str:
    """The same, for these very sizes."""
    exactly = list(map(list, sizes))
    return f"{runtime.measured_on(torch.get_num_threads())}{placed} alone={exactly}"
