"""Calls that have no plan, and plans that no call has asked for yet: how the plans of one method of
one module come to be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ovshim.background import LatePlanner
from ovshim.builder import wait_for
from ovshim.building import Backward
from ovshim.decode import room_for
from ovshim.errors import OptionError
from ovshim.hooks import obstacle
from ovshim.job import Job
from ovshim.options import Options, enabled_in_environment
from ovshim.plan import Plan
from ovshim.planner import Given, Planner, known_kind, unfit
from ovshim.reasons import Reason, reason
from ovshim.recordable import look_out, unrecordable
from ovshim.signature import describe, flatten_call, sizes_of
from ovshim.special_mode import in_special_mode
from ovshim.tally import Tally

__all__ = ["OFF", "Unplanned"]

log = logging.getLogger("ovshim")

OFF = reason("off")
_SELDOM = reason("seldom")


class Unplanned:
    """The plans of one method of one module.

    Args:
        original: the user's own method, run in eager; its `resolve()` gives the bound method.
        divide: see `planner.Planner`.
        quiet: warn of nothing.
        make_planner: makes what makes the plans; None: as the options say.
        backward: notices backward passes, where others do as well.
        may_wait: see `planner.Planner`.

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
        self._at_rest: Any = None  # see `rest`
        self._off = not enabled_in_environment()
        self._room = room_for(module, method, original, options, self._planner.store, self.tally)

    def _publish(self, grad: bool, plans: tuple[Plan, ...]) -> None:
        self._plans[grad] = plans
        self._at_rest = None

    @property
    def has_room(self) -> bool:
        """Whether some calls are steps of `generate()`."""
        return self._room is not None and not self._off

    def stands(self, plan: Plan) -> bool:
        """Whether calls are answered by this plan."""
        return any(plan is known for known in self._plans[plan.grad])

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `original(*args, **kwargs)` would answer."""
        raise NotImplementedError

    def in_eager(self, why: Reason, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Count, warn once or raise, and let the module answer."""
        self.tally.note(why)
        return self.original(*args, **kwargs)

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
            return self.in_eager(OFF if self._off else reason("prefer-eager"), args, kwargs)
        leaves, structure = flatten_call(args, kwargs)
        grad = torch.is_grad_enabled()
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
        if not self._looks_out or self._planner.backward.seen or not torch.is_grad_enabled():
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

    # --- before any call ----------------------------------------------------------------------

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
            waits.append(self._room.maker.wait)
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
            self._room.maker.drop()
