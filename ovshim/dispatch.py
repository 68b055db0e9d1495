"""The right road: a call comes in and is served, by its plan or by the module's own method. What
has no plan, `unplanned` sees to."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ovshim import building
from ovshim.answered import forget_answer
from ovshim.buckets import Bucket
from ovshim.building import building_here, switched_off
from ovshim.decode import NOT_OURS
from ovshim.helper import hot
from ovshim.infer import EngineDead, SpecialValuesError
from ovshim.plan import OutOfRangeError, Plan, Served
from ovshim.pool import ReenteredError
from ovshim.reasons import Reason, reason
from ovshim.rest import REST, Rest, Resting
from ovshim.shortcut import Laying
from ovshim.signals import let_through
from ovshim.special_mode import function_modes, in_special_mode, mode_reason
from ovshim.turns import NOT_ANSWERED, Asked, take_turn
from ovshim.unplanned import OFF, Unplanned

__all__ = ["Dispatcher"]

log = logging.getLogger("ovshim")

_grad_enabled = torch.is_grad_enabled

# Eager plans look at the module's state only every so often: when what was in the way is gone
# (a hook, an attribute), the next call makes a plan.
_LOOK_AGAIN = 8
# After so many calls to eager, for a reason that is not of a call of its own, what is in the way
# does not go soon.
_MANY = 64
_OF_A_CALL = frozenset({"training", "eager-refuses", "special-values"})
_OUT_OF_RANGE = reason("out-of-range")
_REENTERED = reason("reentered")
_SLOWER = reason("slower")
_SPECIAL_VALUES = reason("special-values")
_TRAINING = reason("training")


class Dispatcher(Unplanned):
    """Serves the calls of one method of one module.

    Attributes:
        rests: whether calls that eager serves because it is faster may go there at a glance.
    """

    rests = True
    # Whether there is an eager that builds and `disabled()` can leave calls to.
    _yields = True
    _laying: Laying | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resting = Resting(self.original)
        if hot is not None:
            self._laying = Laying(self)
            self.call = self._laying.shortcut  # type: ignore[method-assign]

    def _publish(self, grad: bool, plans: tuple[Plan, ...]) -> None:
        super()._publish(grad, plans)
        self._resting = Resting(self.original)
        if self._laying is not None:
            self._laying.lift()

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `original(*args, **kwargs)` would answer. The hot path."""
        if building.running and self._yields:
            if building_here():
                return self.original(*args, **kwargs)
            if switched_off():
                return self.in_eager(OFF, args, kwargs)
        rest = self._at_rest
        if (  # not asked by a method of its own, which would take as long again
            type(rest) is Rest
            and rest.left > 0
            and _grad_enabled() is rest.grad
            and not function_modes()  # a mode would see the glance
            and rest.glance(args, kwargs) in rest.sizes
        ):
            rest.left -= 1
            rest.plan.eager_calls.add()
            rest.counter.add()
            original: Any = self.original
            usual = original.usual
            # As `original` would: to call it takes half as long as all of the rest.
            if usual is not None and getattr(type(self.module), original.name) is usual[0]:
                return usual[1](*args, **kwargs)
            return original(*args, **kwargs)
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
                laying = self._laying
                if laying is not None and laying.shortcut.missed >= laying.after:
                    laying.lay(plan, served, tensors)
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
        if self.module.training or in_special_mode():
            return None
        if building.running and self._yields and (building_here() or switched_off()):
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
            if self._laying is not None:
                self._laying.lift()
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
        count = plan.eager_calls.add()
        often = count % _LOOK_AGAIN == _LOOK_AGAIN - 1 or (rest is not None and rest.left <= 0)
        often = often or why.code == "training" or plan.kept_until > 0
        # What the first call has filled, as a table of its own, the next ones may only read.
        often = often or (why.code == "mutates-attribute" and count == 1)
        look_again = plan.generation is not None and often and count >= plan.kept_until
        if look_again and not plan.generation.holds_but_for_values():  # type: ignore[union-attr]
            self._planner.drop_stale()
        elif self.rests and (why.code == "slower" or self._stays(plan, why, count)):
            rest = self._resting.after(plan, self.tally.counter(why), args, kwargs)
            if rest is not None:
                self._let_rest(rest)
        if why.code == "eager-refuses":
            return self._refused(plan, why, args, kwargs)
        return self.in_eager(why, args, kwargs)

    def _stays(self, plan: Plan, why: Reason, count: int) -> bool:
        """Whether a plan's calls will be eager's for longer than a rest."""
        if why.code in _OF_A_CALL or self.options.strict:  # which raises at each
            return False
        return plan.kept_until - count > REST if plan.kept_until else count >= _MANY

    def _let_rest(self, rest: Any) -> None:
        self._at_rest = rest
        if self._laying is not None:
            self._laying.shortcut.rest = None if type(rest) is Rest else rest

    def _refused(
        self, plan: Plan, why: Reason, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        answer = self.in_eager(why, args, kwargs)
        self._planner.drop(plan)  # of an example that was wrong; calls like this one are not
        return answer
