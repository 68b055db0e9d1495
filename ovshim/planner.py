"""Which calls get plans, when they are made, and when they go.

Calls are grouped by kind (structure, dtypes, ranks, constants) and grad mode (`families`). A kind
begins with one plan; a call of other sizes opens those sizes in one rebuild; a module that has
changed drops its plans, and one that changes again and again waits longer and longer for the next.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ovshim.builder import wait_for
from ovshim.building import Backward, Building
from ovshim.cache import Store
from ovshim.early import begin_after
from ovshim.families import Families, Family
from ovshim.job import Job
from ovshim.options import Options
from ovshim.plan import Plan
from ovshim.preflight import Look, look
from ovshim.reasons import Reason, reason
from ovshim.shapes import dynamic_dims
from ovshim.signals import heard
from ovshim.signature import Kind, Structure, UnknownLeafError, kind_of
from ovshim.values import holds_nan
from ovshim.views import copied, copied_together
from ovshim.waiting import look_at

__all__ = ["Given", "Planner", "known_kind", "unfit"]

# One kind of call is captured for at most so many sets of sizes or guards, then eager serves.
_PLANS_PER_KIND = 8
# So many kinds of calls that have no plan, and sizes of each, are taken note of.
_MOST_MET = 32
# So many bytes of a call's inputs are held until the next call.
_MOST_HELD = 64 << 20
# With these there is nothing to keep: it changed under the build, somebody else builds it, or the
# example holds what is left to eager.
_PASSING = frozenset({"stale", "building", "out-of-range"})
# With this it is the example that no graph can be proved with.
_NAN = "special-values"


class Given(NamedTuple):
    """A call that plans are asked for: its arguments, as they came and flattened, its kind, and
    whether grad mode is on in it, and what was begun for it already (`early.Ahead`)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: Kind
    leaves: Sequence[Any]
    grad: bool
    ahead: Any = None


class Planner:
    """Makes and drops the plans of one method of one module.

    Args:
        original: the user's own method; its `resolve()` gives the bound method.
        on_change: called, under the lock, with the plans for each grad mode whenever they change.
        on_gone: called with plans that serve no longer.
        divide: makes a mixed plan of one that eager serves, where that gains something.
        backward: notices backward passes, where others do as well.

    Attributes:
        may_wait: whether a call gets its answer while OpenVINO compiles what the cache has, and the
            next one goes on with the plan.
        backward: whether a backward pass has reached an answer of this method's.
        others: plans of the same module elsewhere, whose graphs may do for the other grad mode.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str,
        original: Any,
        options: Options,
        on_change: Callable[[bool, tuple[Plan, ...]], None],
        on_gone: Callable[[Sequence[Plan]], None],
        divide: Callable[[Job, Plan], Plan] | None = None,
        backward: Backward | None = None,
    ) -> None:
        self.module = module
        self.method = method
        self.original = original
        self.options = options
        self.store = Store(options.cache_dir)
        self._families = Families(options.max_plans)
        self._lock = threading.RLock()
        self._on_change = on_change
        self._on_gone = on_gone
        self._divide = divide
        self.may_wait = False
        self.backward = backward or Backward()
        self.others: Sequence[Plan] = ()

    @property
    def plans(self) -> list[Plan]:
        # Without the lock: it is held as long as a plan is made, and calls ask for them.
        return self._families.plans

    def answer(self, given: Given) -> tuple[Any, Reason]:
        """Eager's answer to a call that has no plan yet, and why eager gave it.

        The call is watched, and a plan is made of what was seen, unless another thread is about
        it. An exception of the user's own module leaves here as it is, and no plan is made.
        """
        if not self._lock.acquire(blocking=False):
            return self.original(*given.args, **given.kwargs), reason("building")
        try:
            family = self._families.of(given.kind, given.grad)
            why = self._put_off(family, given)
            if why is not None:
                return self.original(*given.args, **given.kwargs), why
            job = self._job(family, given, lenient=True)
            with Building():
                output, job.look = self._watched(given)
                if self._is_begun(job):
                    # Not with the look: it is of the module as it is now.
                    job.look, family.job = None, job
                    return output, reason("building")
                plan = self._make(family, job)
            why = None if plan.path == "openvino" else plan.reason
            return output, why or reason("building")
        finally:
            self._lock.release()

    def prepare(self, given: Given, wait: bool = True) -> Plan | None:
        """The plan for an example, made before any call.

        Args:
            wait: False: None, and the plan later, where another thread makes plans.

        Raises:
            OptionError: `dynamic_shapes` does not fit the example.
        """
        with self._lock, torch.set_grad_enabled(given.grad), Building():
            family = self._families.of(given.kind, given.grad)
            return self._make(family, self._job(family, given))

    @property
    def unfinished(self) -> bool:
        """Whether calls have left plans to later ones."""
        return any(family.job is not None for family in self._families)

    def finish(self, wait: bool = True) -> bool:
        """Make the plans that calls have left to later ones; whether there were any.

        Args:
            wait: also for another thread that is about it.
        """
        if not self._lock.acquire(blocking=wait):
            return False
        made = False
        try:
            for family in self._families:
                job, family.job = family.job, None
                if job is None:
                    continue
                made = True
                # Of the module as it is by now, and in a time of its own.
                job = dataclasses.replace(job, started=time.perf_counter())
                with torch.set_grad_enabled(job.grad), Building():
                    self._make(family, job)
            return made
        finally:
            self._lock.release()

    def meet(self, kind: Kind, sizes: tuple[tuple[int, ...], ...]) -> None:
        """Take note of a call that no plan was made of: sizes that differ are left open later."""
        key = kind, torch.is_grad_enabled()
        if key in self._families or len(self._families) < _MOST_MET:
            met = self._families.of(*key).met
            if len(met) < _MOST_MET:
                met.add(sizes)

    def is_cached(self, given: Given) -> bool:
        """Whether the cache has something for such calls, so that a plan is made in tenths."""
        from ovshim.build import is_cached

        with Building():
            return is_cached(self._job(Family(), given, lenient=True))

    def wait(self, timeout: float | None) -> bool:
        """Wait until nothing is being made in other threads; whether that was so in time."""
        # Each is read once: another thread may be about to finish it.
        jobs = [job for family in self._families if (job := family.job) is not None]
        return wait_for([begun.wait for job in jobs if (begun := job.ahead.early)], timeout)

    def drop(self, plan: Plan) -> None:
        """Drop one plan."""
        with self._lock:
            for family in self._families:
                family.plans = [known for known in family.plans if known is not plan]
            self._on_gone([plan])
            self._publish()

    def drop_stale(self) -> None:
        """Drop the plans that the module's present state contradicts."""
        with self._lock:
            self._on_gone([p for family in self._families for p in family.drop_stale()])
            self._publish()

    def drop_all(self) -> None:
        """Drop every plan, and forget how often the module has changed."""
        with self._lock:
            self._on_gone(self.plans)
            self._families.clear()
            self.backward.seen = False
            self._publish()

    # --- making one ---------------------------------------------------------------------------

    def _put_off(self, family: Family, given: Given) -> Reason | None:
        if family.wait > 0:
            family.wait -= 1
            return family.why
        if len(family.plans) >= _PLANS_PER_KIND:
            return reason("too-many-plans")
        seldom = self._families.too_seldom(family)
        if seldom is None and family.why.code == _NAN and holds_nan(given.leaves):
            return family.why  # as the last one
        return seldom

    def _watched(self, given: Given) -> tuple[Any, Look]:
        tensors = [leaf for leaf in given.leaves if isinstance(leaf, torch.Tensor)]
        output: list[Any] = []

        def call() -> Any:
            output.append(self.original(*given.args, **given.kwargs))
            return output[0]

        seen = look(self.module, call, tensors, restore=False, arguments=(given.args, given.kwargs))
        # The user gets the originals and may write to them: what is kept are copies.
        with torch.inference_mode(False):
            together = {id(seen.leaves[i]) for pair in seen.overlaps for i in pair}
            tensors = [leaf for leaf in seen.leaves if isinstance(leaf, torch.Tensor)]
            copies = {id(x): x.detach().clone() for x in tensors if id(x) not in together}
            copies |= copied_together([x for x in tensors if id(x) in together])
        seen.leaves = [copies[id(x)] if isinstance(x, torch.Tensor) else x for x in seen.leaves]
        return output[0], seen

    def _job(self, family: Family, given: Given, lenient: bool = False) -> Job:
        leaves = given.leaves
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        call = self.original.resolve()
        dims = dynamic_dims(self.options, call, given.args, given.kwargs, tensors, lenient)
        with torch.inference_mode(False):
            copies = {id(tensor): copied(tensor) for tensor in tensors}
        job = Job(
            module=self.module,
            method=self.method,
            call=call,
            options=self.options,
            store=self.store,
            kind=given.kind,
            leaves=[copies[id(x)] if isinstance(x, torch.Tensor) else x for x in leaves],
            dynamic=dims,
            grad=given.grad,
            backward=self.backward,
            siblings=[p for p in (*self.plans, *self.others) if p.grad is not given.grad],
            lenient=lenient,
            ahead=given.ahead,
        )
        for plan in family.plans:
            job.open_sizes(plan.pattern, plan.pinned)
        for sizes in list(family.met):
            job.open_sizes(sizes, frozenset())
        return job

    def _is_begun(self, job: Job) -> bool:
        """Begin with what the cache most likely has, for a call that eager has answered; whether
        there is such a thing, and the rest can wait."""
        assert job.look is not None
        if not self.may_wait or job.look.reason or sum(t.nbytes for t in job.tensors) > _MOST_HELD:
            return False
        job.ahead = begin_after(job)
        return job.ahead is not None and job.ahead.early is not None

    def _make(self, family: Family, job: Job) -> Plan:
        with heard(), Building():
            plan = _built(job)
            code = "" if plan.reason is None else plan.reason.code
            passing = code in _PASSING
            if plan.path == "eager" and not passing and self._divide is not None:
                plan = self._divide(job, plan)
        if job.options.memory == "lean" and plan.path == "openvino":
            self._let_go(job, plan)
        with self._lock:
            if code == _NAN and plan.path == "eager":
                family.why = reason(_NAN)  # the next one is made of a call without
            elif passing:
                why = plan.reason if plan.reason and plan.reason.code != "stale" else None
                family.put_off(why=why)
            elif any(known is family for known in self._families):  # not if all was dropped
                self._on_gone([*family.add(plan), *self._families.make_room(plan)])
                self._publish()
        look_at({known.path for known in self.plans})
        return plan

    def _let_go(self, job: Job, plan: Plan) -> None:
        from ovshim.lean import let_go

        plans = [plan, *self.plans]
        let_go(job, plan, [p.generation for p in plans if p.generation is not None])

    def _publish(self) -> None:
        for grad in (False, True):
            # Newest first: of two plans that fit, the later one was made for more sizes. But one of
            # eager's, which is for all sizes, says nothing of those that others were proved for.
            families = self._families.in_mode(grad)
            newest = [p for f in families for p in reversed(f.plans)]
            self._on_change(grad, tuple(sorted(newest, key=lambda plan: plan.served is None)))


def _built(job: Job) -> Plan:
    if job.options.precision == "auto":
        from ovshim.auto import build_auto

        return build_auto(job)
    from ovshim.build import build

    return build(job)


def unfit(leaves: Sequence[Any], grad: bool = False) -> Reason | None:
    """Why a call of such leaves cannot be served whatever the module does with them.

    Args:
        grad: whether grad mode is on in the call.
    """
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            continue
        if not leaf.is_cpu and not leaf.is_meta:
            return reason("not-on-cpu", f"an input is on {leaf.device}")
        if not _is_plain(leaf):
            return reason("special-tensor", f"an input: {type(leaf).__qualname__} {leaf.dtype}")
        if leaf.numel() == 0:
            # Several kernels of OpenVINO 2026.4 end the process, or damage its memory, on these.
            return reason("empty-tensor", f"an input of sizes {tuple(leaf.shape)}")
        # What was computed may be of a call before, in a program without backward passes.
        if grad and leaf.requires_grad and leaf.is_leaf:
            return reason("input-grad")
    return None


def known_kind(leaves: Sequence[Any], structure: Structure, grad: bool) -> Kind | Reason:
    """The kind of a call, or why it has none.

    Args:
        grad: whether grad mode is on in the call.
    """
    try:
        return kind_of(leaves, structure, grad)
    except UnknownLeafError as unknown:
        return reason("unknown-leaf", f"an argument is or holds a {unknown}")


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and tensor.is_cpu
        and not tensor.is_quantized
        and not tensor.is_complex()
        and not tensor.is_nested
    )
