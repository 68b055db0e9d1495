"""Plans made in another thread, while eager answers: the option `background`.

One thread makes them all, one after the other: builds side by side would only slow each other and
the calls that eager serves meanwhile. It is there as long as there is something to make. The module
is in use while it is looked at, so calls of our own are made to a copy over the same parameters,
and what was found is kept only if the module has not changed since the build began.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ovshim.families import Family
from ovshim.generation import Generation
from ovshim.job import BuildStopped, Job
from ovshim.plan import Plan
from ovshim.planner import Given, Planner, building_here
from ovshim.reasons import Reason, reason

__all__ = ["LatePlanner", "Work", "apart", "pause"]

log = logging.getLogger("ovshim")

# What is larger is shared with the copy of the module and not copied.
_COPIED_BYTES = 64 << 20
# A fork waits so long for a stage of a build to end. Longer ones are rather interrupted in the
# child, where whatever lock they hold is never given back, than the program is kept waiting.
_FORK_SECONDS = 30.0
_PAUSE_SECONDS = 0.001


class LatePlanner(Planner):
    """A planner whose plans are made in another thread. A call never waits for one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # Modules that cannot be copied are not looked at while others use them.
        self._late = True

    def answer(self, given: Given) -> tuple[Any, Reason]:
        """Eager's answer, and why eager gave it; the first call of a kind starts a build."""
        if not self._late:
            return super().answer(given)
        build = None
        why: Reason | None = reason("building")
        if self._lock.acquire(blocking=False):
            try:
                family = self._families.of(given.kind, given.grad)
                if not self._is_building(family):
                    why = self._put_off(family)
                    if why is None:
                        job = self._job(family, given, lenient=True)
                        build = family.build = Build(self, family, job)
            finally:
                self._lock.release()
        try:
            output = self.original(*given.args, **given.kwargs)
        except BaseException:
            if build is not None:
                build.end(None)  # a call that fails is no example
            raise
        if build is not None:
            _builder.add(build)
        return output, why or reason("building")

    def prepare(self, given: Given, wait: bool = True) -> Plan | None:
        """The plan for an example. See `Planner.prepare`; None where nobody waits for it."""
        if self._late and building_here():
            with self._lock, torch.set_grad_enabled(given.grad):
                family = self._families.of(given.kind, given.grad)
                plan = self.make(family, self._job(family, given))
            if plan is not None:
                return plan
        while self._late and not building_here():
            build, own = self._asked(given)
            if not wait:
                return None
            build.done.wait()
            if build.plan is None:
                break  # the thread cannot: this one does
            if own or build.plan.match(given.args, given.kwargs) is not None:
                return build.plan
        return super().prepare(given)

    def wait(self, timeout: float | None) -> bool:
        """Wait until no build is under way; whether that was so in time."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not building_here():
            builds = [f.build for f in self._families if self._is_building(f)]
            if not builds:
                return True
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not builds[0].done.wait(left):
                break
        return False

    def _asked(self, given: Given) -> tuple[Build, bool]:
        """The build for such calls that is under way, or a new one, and whether it is that."""
        with self._lock, torch.set_grad_enabled(given.grad):
            family = self._families.of(given.kind, given.grad)
            if self._is_building(family):
                return family.build, False
            job = self._job(family, given)
            build = family.build = Build(self, family, job)
        _builder.add(build)
        return build, True

    def _is_building(self, family: Family) -> bool:
        build = family.build
        # A forked child has its parent's builds, and nobody who makes them.
        return build is not None and build.builder is _builder

    def make(self, family: Family, job: Job) -> Plan | None:
        """Make a plan, in this thread. None where the module cannot be copied."""
        for _ in range(2):  # a module that has changed meanwhile may be done with it
            began = _state(self.module)  # before the copy, which is then of this state or of none
            copied = apart(self.original)
            if copied is None:
                self._late = False
                return None
            job = dataclasses.replace(
                job,
                apart=copied,
                began=began,
                pause=_builder.pause,
                started=time.perf_counter(),
                seconds={},
            )
            plan = self._make(family, job)
            if plan.reason is None or plan.reason.code != "stale":
                break
        return plan


class Build:
    """A plan to be made.

    Attributes:
        done: set when that has come to an end.
        plan: what it has come to; None where it was given up.
        builder: who makes it.
    """

    def __init__(self, planner: LatePlanner, family: Family, job: Job) -> None:
        self.planner = planner
        self.family = family
        self.job = job
        self.builder = _builder
        self.done = threading.Event()
        self.plan: Plan | None = None

    def run(self) -> None:
        """Make it. Nothing is raised."""
        plan = None
        try:
            plan = self.planner.make(self.family, self.job)
        except BaseException:  # users' code runs in there, and nobody is here to be told
            log.debug("a build was given up", exc_info=True)
            self.family.put_off()
        finally:
            self.end(plan)

    def end(self, plan: Plan | None) -> None:
        """Nothing more will come of it than this."""
        self.plan = plan
        self.family.build = None
        self.done.set()


class Work:
    """Something else that is to be made by that thread.

    Attributes:
        done: set when that has come to an end.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._builder = _builder
        self.done = threading.Event()

    @property
    def under_way(self) -> bool:
        # A forked child has its parent's work, and nobody who does it.
        return self._builder is _builder and not self.done.is_set()

    def start(self) -> None:
        """Let the thread do it. Whoever starts it has to keep it."""
        _builder.add(self)

    def run(self) -> None:
        """Do it. Nothing is raised."""
        try:
            self._make()
        except BaseException:  # users' code runs in there, and nobody is here to be told
            log.debug("a build was given up", exc_info=True)
        finally:
            self.end(None)

    def end(self, plan: None) -> None:
        """Nothing more will come of it."""
        self.done.set()


def pause() -> None:
    """What `Job.pause` is for what that thread makes."""
    _builder.pause()


class _Builder:
    """The thread that makes plans, and what forks and the program's end have to know of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Weakly: a module that is gone needs no plan.
        self._queue: collections.deque[weakref.ref[Build | Work]] = collections.deque()
        self._thread: threading.Thread | None = None
        # Held while a stage of a build runs, and while a fork is made.
        self._stage = threading.Lock()
        # Threads that fork, and whether each has got that lock.
        self._forks: dict[int, bool] = {}

    def add(self, build: Build | Work) -> None:
        """Make it after those that were added before."""
        with self._lock:
            self._queue.append(weakref.ref(build))
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._work, name="ovshim-build")
            try:
                # No daemon: one that is inside OpenVINO when the interpreter goes ends the process.
                self._thread.start()
            except RuntimeError as error:  # the program ends, or has all the threads it may have
                log.debug("no thread for builds: %s", error)
                self._thread = None
                self._queue.clear()
                build.end(None)

    def pause(self) -> None:
        """Between two stages: let forks pass, and end with the program.

        Raises BuildStopped in the latter case.
        """
        if _is_ending():
            raise BuildStopped(reason("building", "the program ends"))
        if self is not _builder or threading.current_thread() is not self._thread:
            return  # in a child that a build has forked, or for one that another thread makes
        if self._forks:
            self._stage.release()
            while self._forks:
                time.sleep(_PAUSE_SECONDS)
            self._stage.acquire()

    def _work(self) -> None:
        while True:
            with self._lock:
                build = self._next()
                if build is None:
                    self._thread = None
                    return
            with self._stage:
                build.run()
            del build

    def _next(self) -> Build | Work | None:
        while self._queue:
            build = self._queue.popleft()()
            if build is not None and _is_ending():
                build.end(None)
            elif build is not None and not build.done.is_set():
                return build
        return None

    def before_fork(self) -> None:
        """Wait until no stage is under way: its locks would stay locked in the child."""
        here = threading.get_ident()
        if threading.current_thread() is self._thread:
            return  # what the user's module does in there is its own business
        self._forks[here] = False
        self._forks[here] = self._stage.acquire(timeout=_FORK_SECONDS)
        if not self._forks[here]:
            log.warning("forked in the middle of a build: the child may hang in one of its own")

    def after_fork(self) -> None:
        """Go on, in the parent."""
        here = threading.get_ident()
        if self._forks.get(here):
            self._stage.release()
        self._forks.pop(here, None)


def _is_ending() -> bool:
    # The interpreter waits for threads before it runs what `atexit` has; but the main one is over.
    return not threading.main_thread().is_alive()


def apart(original: Any) -> Any:
    """The user's method over a copy of its module that shares the parameters; None without one."""
    module = original.module
    kept = list(module.parameters())
    held = [*module.buffers(), *(v for m in module.modules() for v in _tensors(m))]
    if sum(t.numel() * t.element_size() for t in {id(t): t for t in held}.values()) > _COPIED_BYTES:
        kept += held
    try:
        # An inference tensor would not tell that it was written to.
        with torch.inference_mode(False):
            return copy.deepcopy(original, {id(tensor): tensor for tensor in kept})
    except Exception as error:  # whatever the attributes of users' modules raise
        log.debug("%s is not copied: %s", type(module).__qualname__, error)
        return None


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [value for value in vars(module).values() if isinstance(value, torch.Tensor)]


def _state(module: torch.nn.Module) -> Generation | None:
    try:
        return Generation(module)
    except ValueError:  # weights that count no versions: the build will say so
        return None


_builder = _Builder()


def _after_fork_in_child() -> None:
    global _builder
    _builder = _Builder()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _builder.before_fork(),
        after_in_parent=lambda: _builder.after_fork(),
        after_in_child=_after_fork_in_child,
    )
