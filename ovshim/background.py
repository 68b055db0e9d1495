"""Plans made in another thread, while eager answers: the option `background`.

The module is in use while it is looked at, so calls of our own are made to a copy over the same
parameters, and what was found is kept only if the module has not changed since the build began.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import threading
import time
import weakref
from typing import Any

import torch

from ovshim.builder import Work, pause
from ovshim.building import building_here
from ovshim.families import Family
from ovshim.generation import Generation
from ovshim.job import Job
from ovshim.plan import Plan
from ovshim.planner import Given, Planner
from ovshim.reasons import Reason, reason

__all__ = ["LatePlanner", "apart"]

log = logging.getLogger("ovshim")

# A build that an example asks for is held so long for a first call, and until that is answered:
# side by side eager and a build take several times as long as one after the other.
_FIRST_CALL_SECONDS = 0.05
# What is larger is shared with the copy of the module and not copied.
_COPIED_BYTES = 64 << 20


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
        held: list[Build] = []
        why: Reason | None = reason("building")
        if self._lock.acquire(blocking=False):
            try:
                held = [first for first in self._builds if first.held]
                family = self._families.of(given.kind, given.grad)
                if self._under_way(family) is None:
                    why = self._put_off(family, given)
                    if why is None:
                        job = self._job(family, given, lenient=True)
                        build = family.build = Build(self, family, job)
            finally:
                self._lock.release()
        try:
            for first in held:
                first.called = True
            output = self.original(*given.args, **given.kwargs)
        except BaseException:
            if build is not None:
                build.end()  # a call that fails is no example
            raise
        finally:
            for first in held:
                first.let_go()
        if build is not None:
            build.go_on()
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
                if own:
                    build.wait_for_call()
                return None
            build.let_go()
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
            builds = self._builds
            if not builds:
                return super().wait(timeout)
            for build in builds:
                build.let_go()
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not builds[0].done.wait(left):
                break
        return False

    def _asked(self, given: Given) -> tuple[Build, bool]:
        """The build for such calls that is under way, or a new one, which is held, and whether it
        is that."""
        with self._lock, torch.set_grad_enabled(given.grad):
            family = self._families.of(given.kind, given.grad)
            build = self._under_way(family)
            if build is not None:
                return build, False
            build = Build(self, family, self._job(family, given))
            build.held = True  # from the beginning: then whoever comes can let it go
            family.build = build
        return build, True

    @property
    def _builds(self) -> list[Build]:
        """Those that are under way, or about to be."""
        return [build for family in self._families if (build := self._under_way(family))]

    def _under_way(self, family: Family) -> Build | None:
        build: Build | None = family.build  # read once: the building thread takes it away
        # A forked child has its parent's builds, and nobody who makes them.
        return build if build is not None and build.under_way else None

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
                pause=pause,
                started=time.perf_counter(),
                seconds={},
            )
            plan = self._make(family, job)
            if plan.reason is None or plan.reason.code != "stale":
                break
        return plan


class Build(Work):
    """A plan to be made.

    Attributes:
        plan: what it has come to; None where it was given up.
        held: whether it waits to be let go: by a first call that is over, by the time in which none
            came, or by somebody who waits for the plan.
        called: whether that call is there.
    """

    def __init__(self, planner: LatePlanner, family: Family, job: Job) -> None:
        super().__init__()
        self.planner = planner
        self.family = family
        self.job = job
        self.plan: Plan | None = None
        self.held = self.called = False
        self._started = threading.Lock()  # taken by whoever starts it
        self._timer = threading.Timer(_FIRST_CALL_SECONDS, _without_call, [weakref.ref(self)])
        self._timer.daemon = True

    def wait_for_call(self) -> None:
        """Let it go after a first call; soon, where none comes."""
        try:
            self._timer.start()
        except RuntimeError as error:  # the program ends, or has all the threads it may have
            log.debug("no thread to wait for a first call: %s", error)
            self.go_on()

    def let_go(self) -> None:
        """Start it if it is held."""
        if self.held:
            self.go_on()

    def go_on(self) -> None:
        """Start it, unless that was done, or it is its parent's, in a fork."""
        if self.under_way and self._started.acquire(blocking=False):
            self.start()
        self.held = False
        self._timer.cancel()

    def make(self) -> None:
        self.plan = self.planner.make(self.family, self.job)

    def failed(self) -> None:
        self.family.put_off()

    def end(self) -> None:
        self.family.build = None
        super().end()


def _without_call(reference: weakref.ref[Build]) -> None:
    build = reference()
    if build is not None and not build.called:
        build.go_on()


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
    except ValueError:  # weights that lie in no one place: the build will say so
        return None
