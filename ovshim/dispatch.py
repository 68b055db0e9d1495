"""The right road: a call comes in and is served, by its plan or by the module's own method."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ovshim import building
from ovshim.answered import forget_answer
from ovshim.background import LatePlanner
from ovshim.buckets import Bucket
from ovshim.builder import wait_for
from ovshim.building import Backward, building_here, switched_off
from ovshim.decode import NOT_OURS, room_for
from ovshim.errors import OptionError
from ovshim.hooks import obstacle
from ovshim.infer import EngineDead, SpecialValuesError
from ovshim.job import Job
from ovshim.options import Options, enabled_in_environment
from ovshim.plan import OutOfRangeError, Plan, Served
from ovshim.planner import Given, Planner, known_kind, unfit
from ovshim.pool import ReenteredError
from ovshim.reasons import Reason, reason
from ovshim.recordable import look_out, unrecordable
from ovshim.rest import Rest
from ovshim.signals import let_through
from ovshim.signature import describe, flatten_call, sizes_of
from ovshim.special_mode import function_modes, in_special_mode, mode_reason
from ovshim.tally import Tally
from ovshim.turns import NOT_ANSWERED, Asked, take_turn

__all__ = ["Dispatcher"]

log = logging.getLogger("ovshim")

_grad_enabled = torch.is_grad_enabled

# Eager plans look at the module's state only every so often: when what was in the way is gone
# (a hook, an attribute), the next call makes a plan.
_LOOK_AGAIN = 8
_OFF = reason("off")
_OUT_OF_RANGE = reason("out-of-range")
_REENTERED = reason("reentered")
_SELDOM = reason("seldom")
_SLOWER = reason("slower")
_SPECIAL_VALUES = reason("special-values")
_TRAINING = reason("training")


class Dispatcher:
    """Serves the calls of one method of one module.

    Args:
        original: the user's own method, run in eager; its `resolve()` gives the bound method.
        divide: see `planner.Planner`.
        quiet: warn of nothing.
        make_planner: makes what makes the plans; None: as the options say.
        backward: notices backward passes, where others do as well.
        may_wait: see `planner.Planner`.

    Attributes:
        tally: counts and tells what became of the calls.
        rests: whether calls that eager serves because it is faster may go there at a glance.
    """

    rests = True
    # Whether there is an eager that `disabled()` can leave calls to.
    _yields = True

    def __init__(
        self,
        module: nn.Module,
        method: str,
        original: Callable[..., Any],
        options: Options,
        divide: Callable[[Job, Plan], Plan] | None = None,
        quiet: bool = False,
        make_planner: Callable[..., Planner] | None = None,
        backward: Backward | None = None,
        may_wait: bool = False,
    ) -> None:
        self.module = module
        self.original = original
        self.options = options
        # By grad mode: what torch does may differ (a TransformerEncoder's fast path does).
        self._plans: dict[bool, tuple[Plan, ...]] = {False: (), True: ()}
        self.tally = Tally(module, lambda: self.plans, options.strict, quiet)
        make = make_planner or (LatePlanner if options.background else Planner)
        self._planner = make(
            module, method, original, options, self._publish, self.tally.retire, divide, backward
        )
        self._planner.may_wait = may_wait and options.memory != "lean"
        self._looks_out = True
        self._at_rest: Rest | None = None
        self._off = not enabled_in_environment()
        self._room = room_for(module, method, original, options, self._planner.store, self.tally)

    def _publish(self, grad: bool, plans: tuple[Plan, ...]) -> None:
        self._plans[grad] = plans
        self._at_rest = None

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `original(*args, **kwargs)` would answer. The hot path."""
        if building.running:
            if building_here():
                return self.original(*args, **kwargs)
            if self._yields and switched_off():
                return self.in_eager(_OFF, args, kwargs)
        rest = self._at_rest
        if (  # not asked by a method of its own, which would take as long again
            rest is not None
            and rest.left > 0
            and _grad_enabled() is rest.grad
            and not function_modes()  # a mode would see the glance
            and rest.glance(args, kwargs) == rest.sizes
        ):
            rest.left -= 1
            rest.plan.eager_calls.add()
            rest.counter.add()
            return self.original(*args, **kwargs)
        if self.module.training or in_special_mode():
            state = _TRAINING if self.module.training else mode_reason()
            return self.in_eager(state, args, kwargs)
        if self._room is not None and not self._off:
            answer = self._room.answer(args, kwargs)
            if answer is not NOT_OURS:
                return answer
        for plan in self._plans[_grad_enabled()]:
            tensors = plan.match(args, kwargs)
            if tensors is None:
                continue
            served = plan.served
            if served is None:
                return self._without_graph(plan, tensors, args, kwargs)
            recorder = served.recorder
            if recorder is not None and (why := recorder.refusal(tensors)) is not None:
                return self.in_eager(why, args, kwargs)
            if plan.key(tensors) not in plan.open:
                bucket = plan.bucket(tensors)
                if bucket in plan.closed:
                    return self._without_graph(plan, tensors, args, kwargs)
                asked = Asked(plan, served, tensors, args, kwargs)
                return self._in_lane(asked, bucket)
            if not plan.generation.holds():  # type: ignore[union-attr] # a served plan has one
                return self._stale(plan, args, kwargs)
            if not plan.other_values_fit(tensors):
                return self.in_eager(_SPECIAL_VALUES, args, kwargs)
            try:
                answer = served.answer(tensors)
            except NOT_ANSWERED as raised:
                let_through(raised)
                # A traceback would keep this frame, and the tensors in it.
                failure = raised.with_traceback(None)
            else:
                plan.calls.add()
                return answer
            # Not inside of `except`: what the user's module raises is to be shown without ours.
            return self.instead(Asked(plan, served, tensors, args, kwargs), failure)
        return self._unplanned(args, kwargs)

    def ready(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], settled: bool = True
    ) -> tuple[Plan, Served, tuple[torch.Tensor, ...]] | None:
        """The plan by which OpenVINO would serve this call, what would serve it (the plan may lose
        it at any time, in another thread), and the call's tensors.

        None where `call` would have eager answer: the same questions, and nothing is counted.

        Args:
            settled: False: also where it is to be found out yet who serves calls of these sizes,
                and where eager is faster. Values that the engine looks for by itself are looked
                for here then: it would refuse those of other calls with them.
        """
        if building_here() or self.module.training or in_special_mode():
            return None
        if building.running and self._yields and switched_off():
            return None
        for plan in self._plans[_grad_enabled()]:
            tensors = plan.match(args, kwargs)
            if tensors is None:
                continue
            served = plan.served
            if served is None:
                return None
            fits = (
                # What it would save for a backward pass may be written to before its turn.
                served.recorder is None
                and (not settled or plan.key(tensors) in plan.open)
                and plan.generation is not None
                and plan.generation.holds()
                and (plan.other_values_fit if settled else plan.values_fit)(tensors)
            )
            if not fits:
                return None
            forget_answer(served.engine)
            return plan, served, tensors
        return None

    def _in_lane(self, asked: Asked, bucket: Bucket) -> Any:
        """A call of sizes that were hardly met before."""
        plan, _, tensors, args, kwargs = asked
        assert plan.generation is not None  # a served plan has one
        lane = plan.lane(bucket)
        if lane.eager:  # since a moment ago
            return self._without_graph(plan, tensors, args, kwargs)
        if not plan.generation.holds():
            return self._stale(plan, args, kwargs)
        if not plan.values_fit(tensors):
            return self.in_eager(_SPECIAL_VALUES, args, kwargs)
        return take_turn(self, asked, lane)

    # --- eager --------------------------------------------------------------------------------

    def in_eager(self, why: Reason, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Count, warn once or raise, and let the module answer."""
        self.tally.note(why)
        return self.original(*args, **kwargs)

    def instead(self, asked: Asked, error: Exception) -> Any:
        """Eager's answer to a call that OpenVINO has not answered."""
        if isinstance(error, OutOfRangeError):
            return self.in_eager(_OUT_OF_RANGE, asked.args, asked.kwargs)
        if isinstance(error, SpecialValuesError):
            return self.in_eager(_SPECIAL_VALUES, asked.args, asked.kwargs)
        self.failed(asked.plan, error)
        return self.original(*asked.args, **asked.kwargs)

    def failed(self, plan: Plan, error: Exception) -> None:
        """OpenVINO raised while it ran: eager answers. If the engine died of it, for good."""
        log.debug("OpenVINO failed on %s", type(self.module).__qualname__, exc_info=error)
        reentered = isinstance(error, ReenteredError)
        why = _REENTERED if reentered else reason("infer-failed", str(error))
        if isinstance(error, EngineDead):
            self.tally.retire([plan])
            plan.served, plan.reason = None, why
        self.tally.note(why)

    def _without_graph(
        self,
        plan: Plan,
        tensors: tuple[torch.Tensor, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call that no graph as a whole serves."""
        if plan.parts is not None:
            if (refused := plan.parts.refusal(tensors)) is not None:
                return self.in_eager(refused, args, kwargs)
            if plan.generation is not None and not plan.generation.holds():
                return self._stale(plan, args, kwargs)
            plan.calls.add()
            return plan.parts(args, kwargs)
        why, rest = plan.reason or _SLOWER, self._at_rest
        nth = plan.eager_calls.add() % _LOOK_AGAIN
        often = nth == _LOOK_AGAIN - 1 or (rest is not None and rest.left <= 0)
        look_again = plan.generation is not None and (often or why.code == "training")
        if look_again and not plan.generation.holds():  # type: ignore[union-attr]
            self._planner.drop_stale()
        elif why.code == "slower" and self.rests:
            self._at_rest = Rest.after(plan, self.tally.counter(why), args, kwargs)
        if why.code == "eager-refuses":
            return self._refused(plan, why, args, kwargs)
        return self.in_eager(why, args, kwargs)

    def _refused(
        self, plan: Plan, why: Reason, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        answer = self.in_eager(why, args, kwargs)
        self._planner.drop(plan)  # of an example that was wrong; calls like this one are not
        return answer

    # --- calls without a plan -----------------------------------------------------------------

    def _stale(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module is not what it was when the plan was made."""
        why = obstacle(self.module)
        if why is not None:  # for the time being; the plan may hold again
            return self.in_eager(why, args, kwargs)
        assert plan.generation is not None
        why = reason("stale", plan.generation.change())
        self._planner.drop_stale()
        return self._unplanned(args, kwargs, why)

    def _unplanned(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], stale: Reason | None = None
    ) -> Any:
        """Look whether such a call can have a plan, and make it if so; eager answers this one."""
        if self._off or self.options.prefer == "eager":
            return self.in_eager(_OFF if self._off else reason("prefer-eager"), args, kwargs)
        leaves, structure = flatten_call(args, kwargs)
        grad = _grad_enabled()
        why = unfit(leaves, grad) or obstacle(self.module)
        if why is None and grad:
            why = unrecordable(leaves, self.module, self._planner.backward)
        if why is not None:
            return self.in_eager(why, args, kwargs)
        kind = known_kind(leaves, structure, grad)
        if isinstance(kind, Reason):
            return self.in_eager(kind, args, kwargs)
        if self._finish(wait=False):
            return self.call(args, kwargs)
        if self._is_to_look_out(leaves):
            return self._looking_out(args, kwargs)
        output, why = self._planner.answer(Given(args, kwargs, kind, leaves, grad))
        self.tally.tell_precision()
        self.tally.note(stale if stale is not None and why.code == "building" else why)
        return output

    def _finish(self, wait: bool = True) -> bool:
        """Make the plans that calls have left to later ones; whether there were any."""
        if not self._planner.unfinished or in_special_mode() or obstacle(self.module) is not None:
            return False
        made = self._planner.finish(wait)
        self.tally.tell_precision()
        return made

    def _is_to_look_out(self, leaves: Sequence[Any]) -> bool:
        if not self._looks_out or self._planner.backward.seen or not _grad_enabled():
            return False
        return any(
            isinstance(x, torch.Tensor) and x.requires_grad and not x.is_leaf for x in leaves
        )

    def _looking_out(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Eager's answer to the first call with an input that was computed of what requires grad:
        mostly there is a backward pass to come, and a plan would not serve after it."""
        self._looks_out = False
        output = self.in_eager(_SELDOM, args, kwargs)
        look_out(output, self._planner.backward)
        return output

    def prepare(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        wait: bool = True,
        grad: bool = False,
        ahead: Any = None,
    ) -> None:
        """Make the plan for an example before any call.

        Args:
            wait: False: another thread makes it, and what it meets is told by the next call.
            grad: whether grad mode is on in the calls to come. They are taken for inference.
            ahead: what was begun for it already (`early.Ahead`).

        Raises:
            OptionError: the module itself refuses the example, or has no such argument as
                `dynamic_shapes` names.
            FallbackError: `strict`, and eager would serve.
        """
        if self._off or self.options.prefer == "eager":
            return
        self._finish()
        leaves, structure = flatten_call(args, kwargs)
        why = obstacle(self.module) or unfit(leaves)
        if why is None and self._room is not None and self._room.takes(args, kwargs):
            decoding = self._room.prepare(args, kwargs, wait)
            self.tally.tell_precision()
            if decoding is not None and decoding.reason is not None:
                self.tally.tell(decoding.reason)
            return
        kind = known_kind(leaves, structure, grad)
        if isinstance(kind, Reason):
            why = kind if why is None else why
        elif why is None:
            why = self._planned(Given(args, kwargs, kind, leaves, grad, ahead), wait)
        if why is not None and wait:
            self.tally.tell(why)

    def _planned(self, given: Given, wait: bool) -> Reason | None:
        """Make the plan; why eager serves by it, or None. Raises OptionError, see `prepare`."""
        plan = self._planner.prepare(given, wait)
        if plan is None:
            return None
        self.tally.tell_precision()
        why = None if plan.path == "openvino" else plan.reason
        if why is not None and why.code == "eager-refuses" and self._refuses(given):
            raise OptionError(
                "example_input",
                describe(given.kind, sizes_of(given.leaves)),
                "what the module itself accepts",
                f"{why.message} Correct the example.",
            ) from plan.trouble
        return why

    def _refuses(self, given: Given) -> bool:
        """Whether the module raises on the example by itself, with nobody looking on."""
        try:
            with torch.no_grad():
                self.original(*given.args, **given.kwargs)
        except Exception as error:  # whatever the user's module raises
            log.debug("the module refuses its example: %s", error)
            return True
        return False

    def share(self, plans: Sequence[Plan]) -> None:
        """Let these plans' graphs, of the same module elsewhere, do for the other grad mode."""
        self._planner.others = plans

    def wait(self, timeout: float | None) -> bool:
        """Wait until nothing is being made in another thread; whether that was so in time. What a
        call has left to later ones is made then, in its own time."""
        waits = [self._planner.wait, self._wait_for_rivals]
        if self._room is not None:
            waits.append(self._room.wait)
        return wait_for(waits, timeout)

    def _wait_for_rivals(self, timeout: float | None) -> bool:
        self._finish()
        engines = [plan.served.engine for plan in self._planner.plans if plan.served]
        return wait_for([rival.wait for e in engines if (rival := e.rival) is not None], timeout)

    # --- for handles and reports --------------------------------------------------------------

    @property
    def plans(self) -> list[Plan]:
        """Every plan that stands."""
        decodings = [] if self._room is None else self._room.plans
        return [*self._planner.plans, *decodings]

    def refresh(self) -> None:
        """Drop every plan: something changed that torch does not count (a write by `.data`)."""
        self._planner.drop_all()
        if self._room is not None:
            self._room.drop()
