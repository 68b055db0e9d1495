"""The hot path once more, in machine code, for calls that are like the last one.

What `dispatch.Dispatcher.call` and `infer.Engine.run` ask of each call, they ask in Python. Where
OpenVINO has answered a call in the usual way, it most likely answers the next one so: what has to
be as it was is put down, and what is to be done then, and the compiled helper goes by that. It
decides nothing: what is otherwise goes the road of all calls, which asks everything itself.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad

from ovshim import building
from ovshim.helper import hot
from ovshim.infer import Engine
from ovshim.matcher import first_computed
from ovshim.plan import Counter, Plan, Served
from ovshim.signals import let_through, let_through_inference
from ovshim.single import MARKS, NO_OUTPUT, SingleThreadEngine
from ovshim.slots import Array, Slot
from ovshim.special_mode import USUAL_MODES
from ovshim.values import anything

__all__ = ["Laying", "raced", "way_of"]

log = logging.getLogger("ovshim")

# A way is laid by the first call that may have one. Where calls are never alike, it is laid again
# and again, each time after twice as many, up to so many.
_MOST = 4095

Facts = tuple[tuple[Any, str, Any], ...]
"""`(owner, name, value)`: as long as `owner.name` is this very value."""


class Road(Protocol):
    """The road of all calls: a dispatcher."""

    module: nn.Module

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
        """The answer to a call."""

    @property
    def has_room(self) -> bool:
        """Whether some calls are answered before their plan is asked for."""

    def stands(self, plan: Plan) -> bool:
        """Whether the plan is one of those that calls are answered by."""


class Laying:
    """Lays ways for the calls of one dispatcher.

    Attributes:
        shortcut: answers calls, by its way or by `Dispatcher.call`.
        after: so many calls that went by `Dispatcher.call` are waited for.
    """

    def __init__(self, dispatcher: Road) -> None:
        self.shortcut: Any = hot.Shortcut(dispatcher.call)
        self.after = 0
        self._dispatcher = dispatcher

    def lay(self, plan: Plan, served: Served, tensors: Sequence[torch.Tensor]) -> None:
        """Lay a way for calls like this, which OpenVINO has just answered, if they can have one."""
        self.shortcut.missed = 0
        self.after = min(2 * self.after + 1, _MOST)
        self.shortcut.way = None
        try:
            way = self._way(plan, served, tensors)
        except Exception as error:  # the call is answered, whatever is not as it was thought to be
            let_through(error)
            log.debug("no way is laid", exc_info=error)
        else:
            self.shortcut.way = way
            # Another thread may have published others meanwhile, and lifted what was there then.
            if not self._dispatcher.stands(plan):
                self.shortcut.way = None

    def _way(self, plan: Plan, served: Served, tensors: Sequence[torch.Tensor]) -> Any:
        opened, calls = plan.open, plan.calls
        if self._dispatcher.has_room or plan.key(tensors) not in opened:
            return None
        facts = (
            (building, "running", 0),
            (self._dispatcher.module, "training", False),
            (plan, "open", opened),
            (plan, "calls", calls),
        )
        return way_of(plan, served, tensors, calls.add, facts)

    def lift(self) -> None:
        """Give up the way, and what rests: plans have come, or gone."""
        self.shortcut.way = self.shortcut.rest = None
        self.after = 0


def raced(
    plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], otherwise: Callable[[], Any]
) -> Callable[[], Any]:
    """What answers a call as the calls after it will be answered, to take the time of it.

    Args:
        otherwise: answers it without a way, and has done so just now.
    """
    tensors = plan.match(args, kwargs)
    if hot is None or plan.served is None or tensors is None:
        return otherwise
    shortcut = hot.Shortcut(lambda args, kwargs: otherwise())
    shortcut.way = way_of(plan, plan.served, tensors, Counter().add)
    return otherwise if shortcut.way is None else functools.partial(shortcut, args, kwargs)


def way_of(
    plan: Plan,
    served: Served,
    tensors: Sequence[torch.Tensor],
    count: Callable[[], Any],
    facts: Facts = (),
) -> Any:
    """The way of calls that have such tensors; None where they are not answered in the usual one.

    Args:
        count: called for each that is answered by it.
        facts: which have to stand, besides those of the plan.
    """
    if served.recorder is not None or served.inputs is not None or served.finite:
        return None
    if plan.generation is None:
        return None
    if any(asked() != usually for asked, usually in USUAL_MODES):
        return None
    engine = served.engine
    if engine.exact is not None and engine.is_left(tensors):
        engine = engine.exact
    slot = _slot(engine)
    bound = 0 if slot is None else slot.bound
    # In this order: who takes it from here on counts up what is bound to it before that changes.
    if slot is None or not _waits(engine, slot) or not _is_usual(engine, slot, tensors):
        return None
    fits, builder = plan.other_values_fit, served.builder
    way = hot.Way(
        facts=(*facts, *_facts_of_plan(plan, served, engine)),
        questions=(
            (torch.is_grad_enabled, torch.is_grad_enabled()),
            *USUAL_MODES,
        ),
        match=plan.match,
        holds=plan.generation.holds,
        sizes=tuple(tensor.shape for tensor in tensors),
        fits=None if fits is anything else fits,
        builder=None if builder is first_computed else builder,
        count=count,
        raised=let_through,
        as_tensor=torch.from_numpy,
        checked=served.checked,
        bound=bound,
        **_inference(engine, slot),
    )
    return way if _waits(engine, slot) and slot.bound == bound else None


def _slot(engine: Engine) -> Slot | None:
    """The slot that the next call would take."""
    waiting = list(engine._pool.free)
    return waiting[-1] if waiting else None


def _waits(engine: Engine, slot: Slot) -> bool:
    return any(slot is other for other in list(engine._pool.free))


def _is_usual(engine: Engine, slot: Slot, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all that it takes to run such tensors is to copy them to where others are bound."""
    if engine.dead is not None or engine.rival is not None or engine.converts or slot.large:
        return False
    if slot.shapes != [x.shape for x in tensors] or any(x.requires_grad for x in tensors):
        return False
    if not all(array.dtype == np.float32 and array.flags.c_contiguous for array in slot.checked):
        return False
    if isinstance(engine, SingleThreadEngine):
        return engine.stay and engine.repeats and bool(slot.heads)
    return True


def _facts_of_plan(plan: Plan, served: Served, engine: Engine) -> Facts:
    return (
        (forward_ad, "_current_level", forward_ad._current_level),
        (plan, "served", served),
        (served.engine, "exact", served.engine.exact),
        (engine, "rival", None),
        (engine, "dead", None),
        (engine, "_pool", engine._pool),
    )


def _inference(engine: Engine, slot: Slot) -> dict[str, Any]:
    pool, arrays, heads = engine._pool, list(slot.checked), list(slot.heads)
    return {
        "engine": engine,
        "pool": pool,
        "waiting": pool.free,
        # Of one that queues calls, those at the same time are left to another.
        "slots": len(pool) if engine.queues else -1,
        "slot": weakref.ref(slot),
        "infer": engine._infer,
        "left": functools.partial(_left, engine),
        "marks": bytes(MARKS) if heads else b"",
        "kept": (arrays, heads),
        "looked_at": tuple(_memory(array, array.size) for array in arrays),
        "heads": tuple(_memory(head, head.nbytes) for head in heads),
    }


def _memory(array: Array, length: int) -> tuple[int, int]:
    return array.ctypes.data, length


def _left(engine: Engine, slot: Slot, error: BaseException | None, ran: bool) -> None:
    """Take back a slot from a call that failed, as `Engine.run` does. The call is then another
    one's to answer.

    Args:
        error: what was raised; None: there was no output. Raised again if it is the program's own.
        ran: whether it came to an `infer`.
    """
    try:
        if isinstance(error, Exception):
            let_through_inference(error)
        elif error is not None:
            raise error
        if ran:
            engine.failed(slot, NO_OUTPUT if error is None else str(error))
    finally:
        engine.take_back(slot)
