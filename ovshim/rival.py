"""Sizes that keep coming get a graph for themselves alone, where it is faster than the open one.

Sizes that are left open cost OpenVINO 2 to 8 % of a call (a ResNet-50, a BERT-base, batch 1). So
once calls of the same sizes have taken long enough to pay for it, another thread compiles the graph
for just these. It is compared with the open one, which was proved, on calls of the program's own;
then both take turns with these and are timed: nobody waits for any of it. The faster one serves;
the open one is put to rest, for it holds all weights a second time, and comes back when a call of
other sizes needs it.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ovshim import blobs, executed, pages, runtime
from ovshim.builder import Work
from ovshim.cache import Entry
from ovshim.deferred import later
from ovshim.infer import Engine
from ovshim.job import Job
from ovshim.plan import Plan
from ovshim.race import Finish
from ovshim.record import Record
from ovshim.signals import let_through
from ovshim.signature import flatten
from ovshim.single import engine_for
from ovshim.special_mode import without_grad
from ovshim.verdict import EntryNotes
from ovshim.verify import Mismatch, compare
from ovshim.wanted import settings_of

__all__ = ["Rival", "add_rival"]

log = logging.getLogger("ovshim")

Sizes = Sequence[Sequence[int]]

# Calls in a row, and how often the time that the open graph took to compile, until it may pay.
_CALLS, _TIMES = 24, 4
# A program that has no sizes which keep coming by then is not asked for ever.
_MOST_CALLS = 4096
_COMPARED = 3
# Pairs of calls, one by each; the first pair is left out. More of them where so few do not tell: a
# gain of 2 % is less than what the machine does to single calls.
_PAIRS, _MOST_PAIRS = 8, 32
# With more than the fewest pairs, the seconds that their calls may take: it is memory for two.
_SECONDS = 8.0
# Medians that are nearer than that are alike: the open graph goes on.
_MARGIN = 1.005


class Rival:
    """Answers an engine's calls until it is settled whether some sizes have a graph of their own.

    Args:
        make: compiles the graph for these sizes alone. Whatever it raises, the open one serves on.
        wake: compiles the open graph again; None: it is small, and not put to rest.
        seconds: that compiling takes.
        tolerance: how far their answers may be apart, see `verify.compare`.
        notes: None where nothing is kept.
        settled: told when the graph for some sizes serves.
    """

    def __init__(
        self,
        make: Callable[[Sizes], Engine],
        wake: Callable[[], Any] | None,
        seconds: float,
        tolerance: float,
        notes: EntryNotes | None,
        settled: Callable[[], Any],
    ) -> None:
        self._make, self._wake = make, wake
        self._enough = _TIMES * seconds
        self._tolerance, self._notes, self._settled = tolerance, notes, settled
        self._lock = threading.Lock()
        self._left = _MOST_CALLS
        self._sizes: list[torch.Size] = []
        self._calls, self._spent = 0, 0.0
        self._work: Work | None = None
        self._candidate: Engine | None = None
        self._has_won = False  # in an earlier process
        self._alike = 0
        self._samples: tuple[list[float], list[float]] = ([], [])

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is being compiled; whether that was so in time."""
        work = self._work
        return work is None or not work.under_way or work.done.wait(timeout)

    # The engine is given with each call: held here, it would outlive its plan.

    def run(self, engine: Engine, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """As `Engine.run`, for the open graph's engine, of which this is the `rival`."""
        candidate = self._candidate
        if [tensor.shape for tensor in tensors] != self._sizes:
            if self._work is None:
                self._begin(engine, tensors)
            return engine.run(tensors, alone=True)
        if candidate is None:
            started = time.perf_counter()
            outputs = engine.run(tensors, alone=True)
            self._count(engine, time.perf_counter() - started)
            return outputs
        candidate.check(engine.checked)  # another plan may have begun to share the engine
        if self._alike < _COMPARED:
            return self._compared(engine, candidate, tensors)
        return self._in_turn(engine, candidate, tensors)

    def _begin(self, engine: Engine, tensors: Sequence[torch.Tensor]) -> None:
        """Sizes that were not those of the last call."""
        self._sizes = [tensor.shape for tensor in tensors]
        self._calls, self._spent = 0, 0.0
        self._left -= 1
        if self._left <= 0:
            self._withdraw(engine)

    def _count(self, engine: Engine, seconds: float) -> None:
        self._calls += 1
        self._spent += seconds
        work = self._work
        if work is not None:
            # It has failed, or is the parent's, of which this is a fork.
            if not work.under_way and self._candidate is None:
                self._withdraw(engine)
        elif self._calls >= _CALLS and self._spent >= self._enough and self._lock.acquire(False):
            try:
                self._start(engine)
            finally:
                self._lock.release()

    def _start(self, engine: Engine) -> None:
        if self._work is not None:
            return
        known = self._notes.known_alone(self._sizes) if self._notes is not None else None
        if known is not None and not _won(known):
            self._withdraw(engine)
            return
        self._has_won = known is not None
        sizes = list(self._sizes)

        def make() -> None:
            self._candidate = self._make(sizes)

        self._work = Work(make)
        self._work.start()

    def _compared(
        self, engine: Engine, candidate: Engine, tensors: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Both answer."""
        outputs = engine.run(tensors, alone=True)
        try:
            others = candidate.run(tensors)
            without_grad(lambda: compare(*flatten(outputs), others, self._tolerance))
        except (Mismatch, RuntimeError, ValueError) as error:
            let_through(error)
            log.info("a graph for %s alone is not used: %s", self._sizes, error)
            self._withdraw(engine)
            return outputs
        self._alike += 1
        if self._alike >= _COMPARED and self._has_won:
            self._settle(engine, candidate)
        return outputs

    def _in_turn(
        self, engine: Engine, candidate: Engine, tensors: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        mine, others = self._samples
        by_candidate = len(others) < len(mine)
        started = time.perf_counter()
        if by_candidate:
            outputs = candidate.run(tensors)
        else:
            outputs = engine.run(tensors, alone=True)
        self._samples[by_candidate].append(time.perf_counter() - started)
        if min(map(len, self._samples)) > _PAIRS and self._lock.acquire(False):
            try:
                self._finish(engine, candidate)
            finally:
                self._lock.release()
        return outputs

    def _finish(self, engine: Engine, candidate: Engine) -> None:
        if engine.rival is not self:
            return
        pairs = min(map(len, self._samples))
        mine, others = (own[1:pairs] for own in self._samples)
        finish = Finish.of(mine, others)
        spent = sum(mine) + sum(others)
        if not finish.decided and pairs <= _MOST_PAIRS and spent < _SECONDS:
            return
        if self._notes is not None and finish.decided:
            self._notes.raced_alone(self._sizes, finish)
        if _won(finish):
            self._settle(engine, candidate)
        else:
            self._withdraw(engine)

    def _settle(self, engine: Engine, candidate: Engine) -> None:
        if engine.rival is not self:  # another thread has settled it, or found an answer wrong
            return
        engine.leave(self._sizes, candidate)
        if self._wake is not None:
            engine.rest(self._wake)
            later(pages.trim)
        engine.rival = None
        self._settled()

    def _withdraw(self, engine: Engine) -> None:
        engine.rival = None
        self._candidate = None


def _won(finish: Finish) -> bool:
    return finish.eager > _MARGIN * finish.candidate


def add_rival(job: Job, plan: Plan, record: Record, entry: Entry | None) -> None:
    """Let sizes that keep coming have a graph for themselves alone, where that is faster."""
    options, settings, source = job.options, settings_of(job, record, job.hint), job.source
    engine = None if plan.served is None else plan.served.engine
    plain = options.device == "CPU" and options.hint == "latency" and options.memory != "lean"
    is_open = any(n is None for dims in record.pattern for n in dims)
    # Of precision by rules nobody would read back what runs.
    if not plain or not is_open or isinstance(options.precision, Mapping):
        return
    if source is None or type(engine) is not Engine:
        return
    if engine.exact is not None or engine.rival is not None:
        return
    if any(other.served is not None and other.served.engine is engine for other in job.siblings):
        return  # it has had its rival
    if job.tiny or job.way not in (None, "usual"):
        return
    device, threads, precision_run = options.device, job.placement["threads"], job.precision_run
    inputs = [job.leaves[i].dtype for i in job.kind.distinct]
    outputs, store, of_plan = record.computed, job.store, weakref.ref(plan)

    def make(sizes: Sizes) -> Engine:
        compiled = runtime.compile_model(source, device, settings, sizes)
        pages.drop(source.with_suffix(".bin"))
        if executed.precision_run(compiled) != precision_run:
            raise ValueError("for these sizes it runs in another precision")
        return engine_for(compiled, threads, inputs, outputs)

    def wake() -> Any:
        if entry is None:
            return runtime.compile_model(source, device, settings)
        return blobs.compiled(store, entry, device, settings)[0]

    def settled() -> None:
        served_by = of_plan()
        if served_by is not None:
            served_by.way = f"{served_by.way or 'usual'}, exact sizes"

    heavy = blobs.is_large(source.parent)
    notes = plan.notes if isinstance(plan.notes, EntryNotes) else None
    seconds = job.seconds.get("compile", 0.0)
    engine.rival = Rival(make, wake if heavy else None, seconds, plan.tolerance, notes, settled)
