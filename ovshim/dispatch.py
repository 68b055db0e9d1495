"""The right road: a call comes in and is served, by its plan or by the module's own method."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ovshim import planner
from ovshim.background import LatePlanner
from ovshim.errors import OptionError
from ovshim.generation import obstacle
from ovshim.infer import EngineDead, SpecialValuesError
from ovshim.job import Job
from ovshim.lanes import Lane
from ovshim.options import Options, enabled_in_environment
from ovshim.plan import OutOfRangeError, Plan, Served
from ovshim.planner import Planner, building_here, known_kind, unfit
from ovshim.reasons import Reason, reason
from ovshim.signature import describe, flatten, flatten_call, sizes_of
from ovshim.tally import Tally
from ovshim.verify import Mismatch, compare

__all__ = ["Dispatcher", "in_special_mode"]

log = logging.getLogger("ovshim")

_grad_enabled = torch.is_grad_enabled
_autocast_on = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch = torch._C._functorch.peek_interpreter_stack

# Eager plans look at the module's state only every so often: when what was in the way is gone
# (a hook, an attribute), the next call makes a plan.
_LOOK_AGAIN = 8
_OUT_OF_RANGE = reason("out-of-range")
_SLOWER = reason("slower")
_SPECIAL_VALUES = reason("special-values")
_NOT_ANSWERED = (OutOfRangeError, RuntimeError, ValueError)
_TAKING_TURNS = reason("taking-turns")


class Dispatcher:
    """Serves the calls of one method of one module.

    Args:
        original: the user's own method, run in eager; its `resolve()` gives the bound method.
        divide: see `planner.Planner`.
        quiet: warn of nothing.

    Attributes:
        tally: counts and tells what became of the calls.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str,
        original: Callable[..., Any],
        options: Options,
        divide: Callable[[Job, Plan], Plan] | None = None,
        quiet: bool = False,
    ) -> None:
        self.module = module
        self.original = original
        self.options = options
        # By grad mode: what torch does may differ (a TransformerEncoder's fast path does).
        self._plans: dict[bool, tuple[Plan, ...]] = {False: (), True: ()}
        self.tally = Tally(module, lambda: self._planner.plans, options.strict, quiet)
        planner_class = LatePlanner if options.background else Planner
        self._planner = planner_class(
            module, method, original, options, self._publish, self.tally.retire, divide
        )
        self._off = not enabled_in_environment()

    def _publish(self, grad: bool, plans: tuple[Plan, ...]) -> None:
        self._plans[grad] = plans

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `original(*args, **kwargs)` would answer. The hot path."""
        if planner.running and building_here():
            return self.original(*args, **kwargs)
        if self.module.training or in_special_mode():
            return self._in_eager(self._mode(), args, kwargs)
        grad = _grad_enabled()
        for plan in self._plans[grad]:
            tensors = plan.match(args, kwargs)
            if tensors is None:
                continue
            served = plan.served
            if served is None:
                return self._without_graph(plan, tensors, args, kwargs)
            if grad and _gradients_wanted(plan, tensors):
                by_input = any(tensor.requires_grad for tensor in tensors)
                why = reason("input-grad" if by_input else "grad")
                return self._in_eager(why, args, kwargs)
            if plan.bucket(tensors) not in plan.open:
                return self._in_lane(plan, tensors, args, kwargs)
            if not plan.generation.holds():  # type: ignore[union-attr] # a served plan has one
                return self._stale(plan, args, kwargs)
            if not plan.other_values_fit(tensors):
                return self._in_eager(_SPECIAL_VALUES, args, kwargs)
            try:
                answer = served.answer(tensors)
            except _NOT_ANSWERED as raised:
                # A traceback would keep this frame, and the tensors in it.
                failure = raised.with_traceback(None)
            else:
                plan.calls.add()
                return answer
            # Not inside of `except`: what the user's module raises is to be shown without ours.
            return self._instead(plan, failure, args, kwargs)
        return self._unplanned(args, kwargs)

    def ready(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], settled: bool = True
    ) -> tuple[Plan, tuple[torch.Tensor, ...]] | None:
        """The plan by which OpenVINO would serve this call, and the call's tensors.

        None where `call` would have eager answer: the same questions, and nothing is counted.

        Args:
            settled: False: also where it is to be found out yet who serves calls of these sizes,
                and where eager is faster.
        """
        if building_here() or self.module.training or in_special_mode():
            return None
        grad = _grad_enabled()
        for plan in self._plans[grad]:
            tensors = plan.match(args, kwargs)
            if tensors is None:
                continue
            fits = (
                plan.served is not None
                and (not settled or plan.bucket(tensors) in plan.open)
                and not (grad and _gradients_wanted(plan, tensors))
                and plan.generation is not None
                and plan.generation.holds()
                and plan.values_fit(tensors)
            )
            return (plan, tensors) if fits else None
        return None

    def _instead(
        self, plan: Plan, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Eager's answer to a call that OpenVINO has not answered."""
        if isinstance(error, OutOfRangeError):
            return self._in_eager(_OUT_OF_RANGE, args, kwargs)
        if isinstance(error, SpecialValuesError):
            return self._in_eager(_SPECIAL_VALUES, args, kwargs)
        self._failed(plan, error)
        return self.original(*args, **kwargs)

    # --- sizes for which it is not settled who serves -----------------------------------------

    def _in_lane(
        self,
        plan: Plan,
        tensors: Sequence[torch.Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call of sizes that eager is faster for, or that were hardly met before."""
        bucket, served = plan.bucket(tensors), plan.served
        lane = plan.lane(bucket)
        turn = lane.turn()
        if served is None or lane.eager:
            return self._without_graph(plan, tensors, args, kwargs)
        started = time.perf_counter()
        if not plan.generation.holds():  # type: ignore[union-attr] # a served plan has one
            return self._stale(plan, args, kwargs)
        if not plan.values_fit(tensors):
            return self._in_eager(_SPECIAL_VALUES, args, kwargs)
        if turn == "both":
            return self._compared(plan, served, lane, tensors, args, kwargs)
        if turn == "openvino":
            failure = None
            try:
                answer = served.answer(tensors)
                plan.calls.add()
            except _NOT_ANSWERED as raised:
                failure = raised.with_traceback(None)
            if failure is not None:
                answer = self._instead(plan, failure, args, kwargs)
        else:
            answer = self._in_eager(_TAKING_TURNS, args, kwargs)
        finish = lane.timed(turn, time.perf_counter() - started)
        if finish is not None:
            plan.settle()
            if plan.notes is not None:
                plan.notes.raced(bucket, finish)
        return answer

    def _compared(
        self,
        plan: Plan,
        served: Served,
        lane: Lane,
        tensors: Sequence[torch.Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Both answer sizes that are met for the first time; a graph that is wrong there goes."""
        expected = self.original(*args, **kwargs)
        try:
            answer = served.answer(tensors)
            with torch.no_grad():
                compare(*flatten(expected), answer, plan.tolerance)
        except OutOfRangeError:
            self.tally.note(_OUT_OF_RANGE)
            return expected
        except Mismatch as mismatch:
            self.tally.retire([plan])
            plan.served = None
            plan.reason = reason("first-use-mismatch", f"{sizes_of(tensors)}: {mismatch}")
            if plan.notes is not None:
                plan.notes.condemn(plan.reason)
            self.tally.note(plan.reason)
            return expected
        except (RuntimeError, ValueError) as error:
            self._failed(plan, error)
            return expected
        lane.passed()
        plan.settle()
        if plan.notes is not None:
            plan.notes.met(sizes_of(tensors))
        plan.calls.add()
        return answer

    # --- eager --------------------------------------------------------------------------------

    def _in_eager(self, why: Reason, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Count, warn once or raise, and let the module answer."""
        self.tally.note(why)
        return self.original(*args, **kwargs)

    def _mode(self) -> Reason:
        """The reason for the state that torch or the module is in."""
        if self.module.training:
            return reason("training")
        return reason("autocast" if _autocast_on() else "special-mode")

    def _without_graph(
        self,
        plan: Plan,
        tensors: Sequence[torch.Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        why = plan.reason or _SLOWER
        if plan.parts is not None and not (_grad_enabled() and _gradients_wanted(plan, tensors)):
            if plan.generation is not None and not plan.generation.holds():
                return self._stale(plan, args, kwargs)
            plan.calls.add()
            return plan.parts(args, kwargs)
        plan.eager_calls.add()
        often = why.code == "training" or plan.eager_calls.value % _LOOK_AGAIN == 0
        look_again = plan.generation is not None and often
        if look_again and not plan.generation.holds():  # type: ignore[union-attr]
            self._planner.drop_stale()
        answer = self._in_eager(why, args, kwargs)
        if why.code == "eager-refuses":
            self._planner.drop(plan)  # of an example that was wrong; calls like this one are not
        return answer

    def _failed(self, plan: Plan, error: Exception) -> None:
        """OpenVINO raised while it ran: eager answers. If the engine died of it, for good."""
        log.debug("OpenVINO failed on %s", type(self.module).__qualname__, exc_info=error)
        why = reason("infer-failed", str(error))
        if isinstance(error, EngineDead):
            self.tally.retire([plan])
            plan.served, plan.reason = None, why
        self.tally.note(why)

    # --- calls without a plan -----------------------------------------------------------------

    def _stale(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module is not what it was when the plan was made."""
        why = obstacle(self.module)
        if why is not None:  # for the time being; the plan may hold again
            return self._in_eager(why, args, kwargs)
        assert plan.generation is not None
        why = reason("stale", plan.generation.change())
        self._planner.drop_stale()
        return self._unplanned(args, kwargs, why)

    def _unplanned(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], stale: Reason | None = None
    ) -> Any:
        """Look whether such a call can have a plan, and make it if so; eager answers this one."""
        if self._off or self.options.prefer == "eager":
            return self._in_eager(reason("off" if self._off else "prefer-eager"), args, kwargs)
        leaves, structure = flatten_call(args, kwargs)
        why = obstacle(self.module) or unfit(leaves, self.module, _grad_enabled())
        if why is not None:
            return self._in_eager(why, args, kwargs)
        kind = known_kind(leaves, structure)
        if isinstance(kind, Reason):
            return self._in_eager(kind, args, kwargs)
        output, why = self._planner.answer(args, kwargs, kind, leaves)
        self.tally.tell_precision()
        self.tally.note(stale if stale is not None and why.code == "building" else why)
        return output

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any], wait: bool = True) -> None:
        """Make the plan for an example before any call.

        Args:
            wait: False: another thread makes it, and what it meets is told by the next call.

        Raises:
            OptionError: the module itself refuses the example, or has no such argument as
                `dynamic_shapes` names.
            FallbackError: `strict`, and eager would serve.
        """
        if self._off or self.options.prefer == "eager":
            return
        leaves, structure = flatten_call(args, kwargs)
        why = obstacle(self.module) or unfit(leaves, self.module, grad=False)
        kind = known_kind(leaves, structure)
        if why is None and isinstance(kind, Reason):
            why = kind
        if why is None and not isinstance(kind, Reason):
            plan = self._planner.prepare(args, kwargs, kind, leaves, wait)
            if plan is None:
                return
            self.tally.tell_precision()
            why = None if plan.path == "openvino" else plan.reason
            if why is not None and why.code == "eager-refuses" and self._refuses(args, kwargs):
                raise OptionError(
                    "example_input",
                    describe(kind, sizes_of(leaves)),
                    "what the module itself accepts",
                    f"{why.message} Correct the example.",
                ) from plan.trouble
        if why is not None and wait:
            self.tally.tell(why)

    def wait(self, timeout: float | None) -> bool:
        """Wait until no plan is being made in another thread; whether that was so in time."""
        return self._planner.wait(timeout)

    def _refuses(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the module raises on the example by itself, with nobody looking on."""
        try:
            with torch.no_grad():
                self.original(*args, **kwargs)
        except Exception as error:  # whatever the user's module raises
            log.debug("the module refuses its example: %s", error)
            return True
        return False

    # --- for handles and reports --------------------------------------------------------------

    @property
    def plans(self) -> list[Plan]:
        """Every plan that stands."""
        return self._planner.plans

    def refresh(self) -> None:
        """Drop every plan: something changed that torch does not count (a write by `.data`)."""
        self._planner.drop_all()


def in_special_mode() -> bool:
    """Whether this thread is under a mode in which only the module's own method is right."""
    return bool(
        (_function_modes() and not _only_cpu_devices())
        or _dispatch_modes()
        or _autocast_on()
        or _functorch() is not None
        or forward_ad._current_level >= 0
    )


def _only_cpu_devices() -> bool:
    """Whether all function modes are `torch.device("cpu")` or `set_default_device` to it."""
    return all(
        type(mode) is DeviceContext and mode.device.type == "cpu"
        for mode in _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    )


def _gradients_wanted(plan: Plan, tensors: Sequence[torch.Tensor]) -> bool:
    wanted = any(tensor.requires_grad for tensor in tensors)
    return wanted or (plan.generation is not None and plan.generation.grad_wanted())
