"""The right road: a call comes in and is served, by its plan or by the module's own method.

`Dispatcher.call` is the hot path. A call that has no plan yet, or whose plan does not hold any
more, takes the slow way: eager answers it, and a plan is made for its like.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd import forward_ad

from ovshim.cache import Store
from ovshim.errors import FallbackError, FallbackWarning, OptionError
from ovshim.options import Options, enabled_in_environment
from ovshim.plan import Counter, Plan
from ovshim.reasons import Reason, reason
from ovshim.shapes import dynamic_dims
from ovshim.signature import (
    Kind,
    UnknownLeafError,
    describe,
    flatten,
    flatten_call,
    kind_of,
    sizes_of,
)

if TYPE_CHECKING:
    from ovshim.job import Job
    from ovshim.preflight import Look

__all__ = ["Dispatcher", "Family"]

log = logging.getLogger("ovshim")

_grad_enabled = torch.is_grad_enabled
_autocast_on = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch = torch._C._functorch.peek_interpreter_stack

# One kind of call is captured for at most so many sets of sizes or guards, then eager serves.
_PLANS_PER_KIND = 8
# A plan that goes stale before it has served so many calls was not worth its build: the next
# build waits, twice as many calls each time.
_WORTH_BUILDING = 16
# A call that eager serves looks at the module's state only every so often: when what was in the
# way is gone (a hook, a mode), a plan is made then.
_LOOK_AGAIN = 64
# Reasons that `strict` does not object to: the user's own doing, or better so.
_FINE_WITH_STRICT = frozenset(
    {"training", "grad", "slower", "prefer-eager", "off", "compiling", "building"}
)
# Reasons that nobody is warned of: they are how the module is used, not what is wrong with it.
_SILENT = _FINE_WITH_STRICT - {"grad"} | {"stale", "special-mode", "autocast"}

# Threads inside a build see the module as it is: what eager answers must be eager's.
_building = threading.local()
_builds_running = 0


class Family:
    """All plans of one kind of call, and what was learnt of its sizes."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.stale = 0
        self.wait = 0

    def widened(self, tensors: Sequence[torch.Tensor], dims: Sequence[set[int]]) -> None:
        """Add the dimensions in which these sizes differ from those of earlier plans."""
        for plan in self.plans:
            for t, (tensor, sizes) in enumerate(zip(tensors, plan.pattern, strict=True)):
                for d, (mine, known) in enumerate(zip(tensor.shape, sizes, strict=True)):
                    if known != mine and (t, d) not in plan.pinned:
                        dims[t].add(d)


class Dispatcher:
    """Serves the calls of one method of one module.

    Args:
        original: the user's own method, run in eager; its `resolve()` gives the bound method.
    """

    def __init__(
        self, module: nn.Module, method: str, original: Callable[..., Any], options: Options
    ) -> None:
        self.module = module
        self.method = method
        self.original = original
        self.options = options
        self.store = Store(options.cache_dir)
        # By grad mode: what torch does may differ (a TransformerEncoder's fast path does).
        self._plans: dict[bool, tuple[Plan, ...]] = {False: (), True: ()}
        self._families: dict[tuple[Kind, bool], Family] = {}
        self._lock = threading.RLock()
        self.eager_calls: dict[str, Counter] = {}
        self._warned: set[str] = set()
        self._served_before = 0
        self._off = not enabled_in_environment()

    # --- the hot path -------------------------------------------------------------------------

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `original(*args, **kwargs)` would answer."""
        grad = _grad_enabled()
        if (
            self.module.training
            or _function_modes()
            or _dispatch_modes()
            or _autocast_on()
            or _functorch() is not None
            or forward_ad._current_level >= 0
            or _builds_running
        ):
            return self._unusual(args, kwargs)
        for plan in self._plans[grad]:
            tensors = plan.match(args, kwargs)
            if tensors is None:
                continue
            served = plan.served
            if served is None:
                return self._by_eager_plan(plan, args, kwargs)
            if grad and self._gradients_wanted(plan, tensors):
                return self._in_eager(reason("grad"), args, kwargs)
            if not plan.generation.holds():  # type: ignore[union-attr]
                return self._stale(plan, args, kwargs)
            try:
                answer = served.answer(tensors)
            except RuntimeError as error:
                return self._failed(plan, error, args, kwargs)
            plan.calls.add()
            return answer
        return self._slow(args, kwargs, grad)

    @staticmethod
    def _gradients_wanted(plan: Plan, tensors: Sequence[torch.Tensor]) -> bool:
        wanted = any(tensor.requires_grad for tensor in tensors)
        return wanted or plan.generation.grad_wanted()  # type: ignore[union-attr]

    # --- eager --------------------------------------------------------------------------------

    def _in_eager(self, why: Reason, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Count, warn once or raise, and let the module answer."""
        self._note(why)
        return self.original(*args, **kwargs)

    def _note(self, why: Reason) -> None:
        counter = self.eager_calls.get(why.code)
        if counter is None:
            counter = self.eager_calls.setdefault(why.code, Counter())
        counter.add()
        if self.options.strict and why.code not in _FINE_WITH_STRICT:
            raise FallbackError(why)
        if why.code not in self._warned:
            self._warned.add(why.code)
            if why.code not in _SILENT:
                name = type(self.module).__qualname__
                warnings.warn(FallbackWarning(why, name), stacklevel=_users_frame())

    def _unusual(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _builds_running:
            if getattr(_building, "depth", 0):
                return self.original(*args, **kwargs)
            code = self._mode()
            return (
                self._ordinary(args, kwargs)
                if code is None
                else self._in_eager(reason(code), args, kwargs)
            )
        return self._in_eager(reason(self._mode() or "special-mode"), args, kwargs)

    def _ordinary(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hot path while some thread builds something."""
        grad = _grad_enabled()
        for plan in self._plans[grad]:
            tensors = plan.match(args, kwargs)
            if tensors is not None and plan.served is not None and plan.generation is not None:
                if not plan.generation.holds() or (grad and self._gradients_wanted(plan, tensors)):
                    break
                try:
                    answer = plan.served.answer(tensors)
                except RuntimeError as error:
                    return self._failed(plan, error, args, kwargs)
                plan.calls.add()
                return answer
        return self._slow(args, kwargs, grad)

    def _mode(self) -> str | None:
        """The reason code for the state that torch is in, or None."""
        if self.module.training:
            return "training"
        if _autocast_on():
            return "autocast"
        modes = _function_modes() or _dispatch_modes() or _functorch() is not None
        return "special-mode" if modes or forward_ad._current_level >= 0 else None

    def _by_eager_plan(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan.calls.add()
        if plan.generation is not None and plan.calls.value % _LOOK_AGAIN == 0:
            if not plan.generation.holds():
                self._forget(plan)
        why = plan.reason
        assert why is not None
        return self._in_eager(why, args, kwargs)

    def _failed(
        self, plan: Plan, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """OpenVINO raised while it ran: eager answers this call and all that follow."""
        from ovshim.infer import EngineDead

        if isinstance(error, EngineDead):
            self._retire(plan)
            plan.served = None
            plan.reason = reason("infer-failed", str(error))
            return self._in_eager(plan.reason, args, kwargs)
        log.debug("OpenVINO does not take these sizes", exc_info=True)
        return self._in_eager(reason("infer-failed", str(error)), args, kwargs)

    # --- making plans -------------------------------------------------------------------------

    def _stale(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module is not what it was when the plan was made."""
        assert plan.generation is not None
        why = reason("stale", plan.generation.change())
        self._forget(plan)
        self._note(why)
        return self._slow(args, kwargs, _grad_enabled())

    def _forget(self, plan: Plan) -> None:
        """Drop a plan and all others of the module: what changed concerns them too."""
        with self._lock:
            for family in self._families.values():
                if plan in family.plans:
                    family.stale = 0 if plan.calls.value >= _WORTH_BUILDING else family.stale + 1
                    family.wait = 2**family.stale - 1 if family.stale > 1 else 0
                gone = [p for p in family.plans if p.generation and not p.generation.holds()]
                family.plans = [p for p in family.plans if p not in gone]
                for dropped in gone:
                    self._retire(dropped)
            self._republish()

    def _retire(self, plan: Plan) -> None:
        """Keep the count of a plan's calls when the plan goes."""
        if plan.served is not None:
            self._served_before += plan.calls.value
        plan.calls = Counter()

    def refresh(self) -> None:
        """Drop every plan: something changed that torch does not count (a write by `.data`)."""
        with self._lock:
            for plan in self.plans:
                self._retire(plan)
            for family in self._families.values():
                family.plans.clear()
                family.stale = family.wait = 0
            self._republish()

    def _republish(self) -> None:
        for grad in (False, True):
            families = [f for (_, mode), f in self._families.items() if mode is grad]
            # Newest first: of two plans that fit, the later one was made for more sizes.
            self._plans[grad] = tuple(p for family in families for p in reversed(family.plans))

    def _slow(self, args: tuple[Any, ...], kwargs: dict[str, Any], grad: bool) -> Any:
        """A call without a plan: look whether it can have one, and make it if so."""
        if self._off or self.options.prefer == "eager":
            return self._in_eager(reason("off" if self._off else "prefer-eager"), args, kwargs)
        leaves, structure = flatten_call(args, kwargs)
        unfit = self._unfit(leaves, grad)
        if unfit is not None:
            return self._in_eager(unfit, args, kwargs)
        kind = kind_of(leaves, structure)
        if not self._lock.acquire(blocking=False):
            return self._in_eager(reason("building"), args, kwargs)
        try:
            family = self._families.setdefault((kind, grad), Family())
            if family.wait > 0:
                family.wait -= 1
                return self._in_eager(reason("stale"), args, kwargs)
            if len(family.plans) >= _PLANS_PER_KIND:
                return self._in_eager(reason("too-many-plans"), args, kwargs)
            return self._make_and_serve(family, args, kwargs, kind, leaves, grad)
        finally:
            self._lock.release()

    def _unfit(self, leaves: Sequence[Any], grad: bool) -> Reason | None:
        """Why a call of such leaves cannot be served whatever the module does with them."""
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                continue
            if not leaf.is_cpu and not leaf.is_meta:
                return reason("not-on-cpu", f"an input is on {leaf.device}")
            if not _is_plain(leaf):
                return reason("special-tensor", f"an input: {type(leaf).__qualname__} {leaf.dtype}")
            if grad and leaf.requires_grad:
                return reason("grad")
        if grad and any(p.requires_grad for p in self.module.parameters()):
            return reason("grad")
        try:
            kind_of(leaves, flatten(None)[1])
        except UnknownLeafError as unknown:
            return reason("unknown-leaf", f"an argument is or holds a {unknown}")
        return None

    def _make_and_serve(
        self,
        family: Family,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kind: Kind,
        leaves: Sequence[Any],
        grad: bool,
    ) -> Any:
        """Eager answers this call, watched; then its plan is made. An exception of the user's own
        module leaves here as it is, and no plan is made of it."""
        from ovshim.preflight import look

        job = self._job(family, args, kwargs, kind, leaves, grad)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        output: list[Any] = []

        def call() -> Any:
            output.append(self.original(*args, **kwargs))
            return output[0]

        with _Building():
            seen = look(self.module, call, tensors, restore=False)
            job.look = _detached(seen)
            plan = self._make(family, job)
        if plan.reason is not None:
            self._note(plan.reason)
        else:
            self._count("building")
        return output[0]

    def _count(self, code: str) -> None:
        self.eager_calls.setdefault(code, Counter()).add()

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | None:
        """Make the plan for an example before any call; None where there can be none yet.

        Raises:
            OptionError: the module itself refuses the example, or holds no such argument as
                `dynamic_shapes` names.
            FallbackError: `strict`, and eager would serve.
        """
        if self._off or self.options.prefer == "eager":
            return None
        leaves, structure = flatten_call(args, kwargs)
        unfit = self._unfit(leaves, grad=False)
        if unfit is not None:
            self._note(unfit)
            return None
        kind = kind_of(leaves, structure)
        # The calls to come are inference; what grad mode the example is given in says nothing.
        grad = False
        with self._lock, torch.no_grad(), _Building():
            family = self._families.setdefault((kind, grad), Family())
            plan = self._make(family, self._job(family, args, kwargs, kind, leaves, grad))
        if plan.reason is not None:
            if plan.reason.code == "eager-refuses":
                raise OptionError(
                    "example_input",
                    describe(kind, sizes_of(leaves)),
                    "what the module itself accepts",
                    f"{plan.reason.message} Correct the example.",
                )
            self._note(plan.reason)
            self.eager_calls.pop(plan.reason.code, None)  # nothing was called yet
        return plan

    def _job(
        self,
        family: Family,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kind: Kind,
        leaves: Sequence[Any],
        grad: bool,
    ) -> Job:
        from ovshim.job import Job

        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        call = self.original.resolve()  # type: ignore[attr-defined]
        dims = [set(d) for d in dynamic_dims(self.options, call, args, kwargs, tensors)]
        family.widened(tensors, dims)
        with torch.inference_mode(False):
            copies = {id(t): t.detach().clone() for t in tensors}
        ours = [copies[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return Job(
            module=self.module,
            method=self.method,
            call=call,
            options=self.options,
            store=self.store,
            kind=kind,
            leaves=ours,
            dynamic=tuple(frozenset(d) for d in dims),
            grad=grad,
        )

    def _make(self, family: Family, job: Job) -> Plan:
        from ovshim.build import build

        plan = build(job)
        # A plan for more sizes takes the place of those that it covers.
        family.plans = [p for p in family.plans if not plan.covers(p)]
        family.plans.append(plan)
        self._republish()
        return plan

    # --- what a report asks -------------------------------------------------------------------

    @property
    def openvino_calls(self) -> int:
        """Calls served by OpenVINO, those of plans that are gone included."""
        return self._served_before + sum(p.calls.value for p in self.plans if p.served)

    def reset_counters(self) -> None:
        with self._lock:
            self._served_before = 0
            self.eager_calls.clear()
            for plan in self.plans:
                plan.calls = Counter()

    @property
    def plans(self) -> list[Plan]:
        with self._lock:
            return [plan for family in self._families.values() for plan in family.plans]


class _Building:
    """Marks this thread as one that builds, so that its calls of any accelerated module are eager."""

    def __enter__(self) -> None:
        global _builds_running
        _building.depth = getattr(_building, "depth", 0) + 1
        with _BUILDS:
            _builds_running += 1

    def __exit__(self, *exc: object) -> None:
        global _builds_running
        _building.depth -= 1
        with _BUILDS:
            _builds_running -= 1


_BUILDS = threading.Lock()


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and tensor.is_cpu
        and not tensor.is_quantized
        and not tensor.is_complex()
    )


def _detached(seen: Look) -> Look:
    """The look with copies of its tensors: the user has the originals and may write to them."""
    made: dict[int, torch.Tensor] = {}
    with torch.inference_mode(False):
        for leaf in seen.leaves:
            if isinstance(leaf, torch.Tensor):
                made.setdefault(id(leaf), leaf.detach().clone())
    seen.leaves = [
        made[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf for leaf in seen.leaves
    ]
    return seen


def _users_frame() -> int:
    """How far up the stack the first frame is that is neither ours nor torch's."""
    import sys

    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("ovshim.", "torch.")):
            return level
        level, frame = level + 1, frame.f_back
    return level
