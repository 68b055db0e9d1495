"""A dispatcher that makes no plan before the module has been called often enough for it to pay."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from ovshim.attributes import tensors_of
from ovshim.decode import NOT_OURS
from ovshim.dispatch import Dispatcher
from ovshim.options import Options
from ovshim.parts import divide
from ovshim.plan import Plan
from ovshim.planner import Given, known_kind
from ovshim.reasons import Reason, reason
from ovshim.signals import let_through
from ovshim.signature import flatten_call, sizes_of

__all__ = ["Patient"]

log = logging.getLogger("ovshim")

# However slow they are: a call or two may be all that there is.
_FEWEST_CALLS = 2
# Seconds that eager must have taken before a plan is made. Whoever has waited for eager as long as
# a build would take has lost at most as much again; and what the cache holds is there in tenths.
_WORTH_BUILDING = 1.0
_WORTH_LOOKING_UP = 0.1
# So many plans one module may have, whatever the kinds of its calls.
_MOST_PLANS = 8
# This part of eager's time may be spent on looking at sizes.
_SPENT_LOOKING = 0.02
# Calls are timed one by one at first, then each one for so many: to time costs time.
_ALL_TIMED = 64
_TIMED = 16
_LONGEST_REST = 4096

_SELDOM = reason("seldom")
# Another process may write to them, and nobody here has a handle to say so by `refresh()`.
_SHARED = reason("untracked-weights", "in a scope, weights in memory that processes share")


class Patient(Dispatcher):
    """Serves a module that nobody has asked to accelerate.

    Args:
        least: the speedup below which a plan does not serve.

    Attributes:
        resting: so many calls need not come here, for eager would serve them anyway.
        why: why eager served last.
        closed: it is given mappings of a class of their own (transformers' BatchEncoding, in
            sentence-transformers): such a call can have no plan, but those within it can.
    """

    rests = False  # it has longer ones

    def __init__(self, module: nn.Module, original: Any, options: Options, least: float) -> None:
        self._least = least
        super().__init__(module, "forward", original, options, divide, quiet=True)
        self.resting = 0
        self.why: Reason | None = None
        self.closed = False
        self._closed_by: Reason | None = None
        self._rest = 1
        self._built = 0
        self._begin()
        if self._room is not None:
            self._room.maker.patience = self

    def _begin(self) -> None:
        """Count anew what eager costs."""
        self._calls = 0
        self._seconds = self._looking = 0.0
        self._needed = _WORTH_LOOKING_UP * 2.0**self._built
        self._weights = self._versions()

    def count(self, calls: int, seconds: float) -> None:
        """Eager has served these calls before."""
        self._calls += calls
        self._seconds += seconds

    def let_go(self) -> None:
        """The module is gone: give its graphs and weights back at once, which cycles through here
        would keep until Python's collector comes by."""
        vars(self).clear()

    @property
    def standing(self) -> list[Plan]:
        """Every plan that stands; asked for without a lock."""
        decodings = [] if self._room is None else self._room.plans
        return [*(plan for known in list(self._plans.values()) for plan in known), *decodings]

    # --- before there is a plan ---------------------------------------------------------------

    def _unplanned(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], stale: Reason | None = None
    ) -> Any:
        if stale is not None:
            self._changed()
        if self._off or self.options.prefer == "eager":
            return super()._unplanned(args, kwargs, stale)
        if sum(map(len, self._plans.values())) >= _MOST_PLANS:
            if not self._serves():
                self._take_rest()
            return self.in_eager(reason("too-many-plans"), args, kwargs)
        if not self._finds_due(lambda: self._is_due(args, kwargs)):
            return self._waited(stale or _SELDOM, args, kwargs)
        if self._finds_due(self._is_shared):
            self._take_rest()
            return self.in_eager(_SHARED, args, kwargs)
        if self._is_to_look_out(flatten_call(args, kwargs)[0]):
            return self._looking_out(args, kwargs)
        # The next kind of call has to earn its plan as well, and more than this one had to; and in
        # other threads, meanwhile, no call is due.
        self._changed()
        output = super()._unplanned(args, kwargs, stale)
        if not self._serves():
            self._take_rest()
        return output

    def _is_shared(self) -> bool:
        held = (tensor for _, tensor in chain(*tensors_of(self.module)))
        dense = (tensor for tensor in held if tensor.layout is torch.strided)
        return any(tensor.is_shared() for tensor in dense)  # type: ignore[no-untyped-call]

    def _finds_due(self, question: Callable[[], bool]) -> bool:
        try:
            return question()
        except Exception as error:  # a fault of ours must not become one of the user's program
            let_through(error)
            log.debug("%s is left to eager", self.tally.name, exc_info=True)
            return False

    def _is_due(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a plan is to be made of this call."""
        if self._calls < _FEWEST_CALLS or self._looking <= _SPENT_LOOKING * self._seconds:
            started = time.perf_counter()
            self._meet(args, kwargs)
            self._looking += time.perf_counter() - started
        return self._has_earned(lambda: self._is_cached(args, kwargs))

    def _has_earned(self, is_cached: Callable[[], bool]) -> bool:
        """Whether eager has taken as long as would pay for a plan."""
        if self._calls < _FEWEST_CALLS:
            return False
        wanted = self.options.prefer == "openvino"
        if not wanted and self._seconds < self._needed:
            return False
        if self._versions() != self._weights:  # trained between calls
            self._changed()
            return False
        if not wanted and self._needed < self._price() and not is_cached():
            self._needed = self._price()
            return self._seconds >= self._needed
        return True

    def _waited(self, why: Reason, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Eager's answer, timed."""
        started = time.perf_counter()
        output = self.in_eager(why, args, kwargs)
        spent = time.perf_counter() - started
        stands_for = 1
        if self._calls >= _ALL_TIMED and not self._serves():
            stands_for = _TIMED
            self.resting = _TIMED - 1
        self._seconds += stands_for * spent
        self._calls += stands_for
        return output

    def _meet(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Sizes in which calls differ are left open by the first plan."""
        leaves, structure = flatten_call(args, kwargs)
        kind = known_kind(leaves, structure, torch.is_grad_enabled())
        if not isinstance(kind, Reason):
            self._planner.meet(kind, sizes_of(leaves))
        elif any(isinstance(leaf, Mapping) for leaf in leaves) and not self._planner.plans:
            # Not for whatever is unknown: a cache goes through all layers of a language model, and
            # there would be a plan for each.
            self.closed, self._closed_by = True, kind

    def _is_cached(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        leaves, structure = flatten_call(args, kwargs)
        grad = torch.is_grad_enabled()
        kind = known_kind(leaves, structure, grad)
        with contextlib.suppress(Exception):  # the build will meet it again, and say so
            if not isinstance(kind, Reason):
                return self._planner.is_cached(Given(args, kwargs, kind, leaves, grad))
        return False

    def _price(self) -> float:
        return _WORTH_BUILDING * 2.0**self._built

    def _changed(self) -> None:
        """A plan has been made, or the module is not what it was: the next one has to earn more."""
        self._built += 1
        self._begin()

    def _versions(self) -> list[tuple[int, int]]:
        held = [*self.module.parameters(), *self.module.buffers()]
        return [(id(t), 0 if t.is_inference() else t._version) for t in held]

    # --- steps of decoding --------------------------------------------------------------------

    def before_decoding(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `decode.maker.Patience`."""
        if not self._finds_due(lambda: self._has_earned(self._decoding_is_cached)):
            return self._waited(_SELDOM, args, kwargs)
        self._changed()
        return NOT_OURS

    def _decoding_is_cached(self) -> bool:
        with contextlib.suppress(Exception):  # the build will meet it again, and say so
            return self._room is not None and self._room.maker.is_cached()
        return False

    def made_decoding(self, made: Plan) -> None:
        """See `decode.maker.Patience`."""
        self._leave_if_slow(made)
        self.why = made.reason
        self.resting, self._rest = 0, 1

    # --- plans that do not pay ----------------------------------------------------------------

    def _publish(self, grad: bool, plans: tuple[Plan, ...]) -> None:
        for plan in plans:
            self._leave_if_slow(plan)
        super()._publish(grad, plans)
        self.resting, self._rest = 0, 1

    def _leave_if_slow(self, plan: Plan) -> None:
        slow = plan.speedup is not None and plan.speedup < self._least
        if slow and plan.reason is None and self.options.prefer == "faster":
            self.tally.retire([plan])
            plan.served = None
            text = f"{plan.speedup:.2f}x is less than min_speedup={self._least:g}"
            plan.reason = reason("slower", text)
        elif slow and plan.parts is not None:
            self.tally.retire([plan])
            plan.parts = None

    def _without_graph(
        self,
        plan: Plan,
        tensors: tuple[torch.Tensor, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if not self._serves():
            self._take_rest()
        return super()._without_graph(plan, tensors, args, kwargs)

    def in_eager(self, why: Reason, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.why = self._closed_by or why
        return super().in_eager(why, args, kwargs)

    def _serves(self) -> bool:
        """Whether OpenVINO serves any calls at all."""
        if self._room is not None and any(p.path == "openvino" for p in self._room.plans):
            return True
        for plan in (plan for known in self._plans.values() for plan in known):
            lanes = list(plan.lanes.values()) if plan.served is not None else []
            if plan.parts is not None or not all(lane.eager for lane in lanes):
                return True
        return False

    def _take_rest(self) -> None:
        """Even to find out that eager serves costs more than a small module's call."""
        self.resting = self._rest
        self._rest = min(2 * self._rest, _LONGEST_REST)
