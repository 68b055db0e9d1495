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

# A build that an example began waits so long for a first call, and until that is answered: side by
# side eager and a build take several times as long as one after the other.
_FIRST_CALL_SECONDS = 0.05
_LOOK_SECONDS = 0.005
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
        ahead: Build | None = None
        why: Reason | None = reason("building")
        if self._lock.acquire(blocking=False):
            try:
                family = self._families.of(given.kind, given.grad)
                if not self._is_building(family):
                    why = self._put_off(family)
                    if why is None:
                        job = self._job(family, given, lenient=True)
                        build = family.build = Build(self, family, job)
                else:
                    ahead = family.build
            finally:
                self._lock.release()
        if ahead is not None:
            ahead.called = True
        try:
            output = self.original(*given.args, **given.kwargs)
        except BaseException:
            if build is not None:
                build.end()  # a call that fails is no example
            raise
        finally:
            if ahead is not None:
                ahead.go_on()
        if build is not None:
            build.start()
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
            build, own = self._asked(given, wait)
            if not wait:
                return None
            build.go_on()
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
            builds[0].go_on()
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not builds[0].done.wait(left):
                break
        return False

    def _asked(self, given: Given, wait: bool) -> tuple[Build, bool]:
        """The build for such calls that is under way, or a new one, and whether it is that."""
        with self._lock, torch.set_grad_enabled(given.grad):
            family = self._families.of(given.kind, given.grad)
            if self._is_building(family):
                return family.build, False
            job = self._job(family, given)
            build = family.build = Build(self, family, job, lets_pass=not wait)
        build.start()
        return build, True

    def _is_building(self, family: Family) -> bool:
        build = family.build
        # A forked child has its parent's builds, and nobody who makes them.
        return build is not None and build.under_way

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

    Args:
        lets_pass: whether the first call goes first, if it comes soon.

    Attributes:
        plan: what it has come to; None where it was given up.
        called: whether that call is there.
    """

    def __init__(
        self, planner: LatePlanner, family: Family, job: Job, lets_pass: bool = False
    ) -> None:
        super().__init__()
        self.planner = planner
        self.family = family
        self.job = job
        self.plan: Plan | None = None
        self.called = False
        self._free = threading.Event()
        if not lets_pass:
            self._free.set()

    def go_on(self) -> None:
        """The first call is over, or nobody waits for it."""
        self._free.set()

    def make(self) -> None:
        ends = time.monotonic() + _FIRST_CALL_SECONDS
        while not self._free.wait(_LOOK_SECONDS) and (self.called or time.monotonic() < ends):
            pause()
        self.plan = self.planner.make(self.family, self.job)

    def failed(self) -> None:
        self.family.put_off()

    def end(self) -> None:
        self.family.build = None
        super().end()


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
