"""Several calls under way at once: `fast.ovshim.map` and `fast.ovshim.submit`.

Threads, each in OpenVINO's own `infer`, which lets go of Python's lock: as fast as its asynchronous
requests, and right after a fork, where those hang. Only what is computed runs in them. Modules in
eager may keep state and need not be safe among threads, so eager answers one call at a time.
"""

from __future__ import annotations

import collections
import logging
import numbers
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from ovshim.errors import OptionError
from ovshim.example import as_call
from ovshim.plan import Plan, Served
from ovshim.serve.flight import FAILURES, Call, Flight, Kept, Modes, Ready, dispatcher_of, ready
from ovshim.signals import let_through
from ovshim.special_mode import in_special_mode

__all__ = ["in_order", "submitted"]

log = logging.getLogger("ovshim")

# So many calls a thread may have been made of which nobody has taken the answers: where one of them
# is held up, the other threads go on.
_AHEAD = 2
_TAKEN_FOR_SHORT = 63


# --- map ------------------------------------------------------------------------------------------


def in_order(module: nn.Module, items: Iterable[Any], in_flight: int | None) -> Iterator[Any]:
    """The module's answers to the items; see `Handle.map`.

    Raises:
        OptionError: `in_flight` is no count; there is nothing to go through.
    """
    if not isinstance(items, Iterable) and not hasattr(items, "__getitem__"):
        remedy = "Put the examples into a list, or ask submit() for a single one."
        raise OptionError("items", items, "an iterable of example inputs", remedy)
    count = isinstance(in_flight, numbers.Integral) and not isinstance(in_flight, bool)
    if in_flight is not None and (not count or in_flight < 1):
        raise OptionError(
            "in_flight",
            in_flight,
            "a whole number above 0 or None",
            "Leave it out for as many as OpenVINO advises.",
        )
    return _Line(module, in_flight).answers(items)


class _Line:
    """Calls under way, the earliest first."""

    def __init__(self, module: nn.Module, in_flight: int | None) -> None:
        self.module = module
        self.in_flight = in_flight
        self.dispatcher = dispatcher_of(module)
        self.waiting: collections.deque[tuple[Flight, Future[Any]]] = collections.deque()
        self.pool: ThreadPoolExecutor | None = None
        # Sizes of a call that was none for a thread, and how many more are taken for such by them:
        # to ask what serves a call, and what it takes, costs half of a short one's time.
        self.short: tuple[torch.Size, ...] | None = None
        self.left = 0

    def answers(self, items: Iterable[Any]) -> Iterator[Any]:
        """What the module answers to each. Raises at an item's turn what it raises."""
        whole = False
        try:
            for call in _calls(items):
                if isinstance(call, Exception):
                    yield from self.landed(0)
                    raise call
                if self.is_short(call):
                    yield self.here(None, call)
                    continue
                found = None if self.in_flight == 1 else ready(self.module, self.dispatcher, *call)
                threaded = found is not None and self.is_worth_a_thread(*found)
                flight = Flight(*found, call) if found is not None and threaded else None
                if flight is not None and self.begun(flight):
                    yield from self.landed(_AHEAD * (self.in_flight or flight.threads))
                elif self.waiting:
                    # Eager's turn comes when all before it have had theirs; and nothing is read
                    # ahead beyond it, for what it does may decide what comes after.
                    yield from self.landed(0)
                    yield self.here(None, call)
                else:
                    self.note(call, found)
                    yield self.here(found, call)
            yield from self.landed(0)
            whole = True
        except GeneratorExit:
            whole = True
            raise
        finally:
            if self.pool is not None:
                # An interrupt may have left a lock of the pool's with nobody: then not to wait.
                self.pool.shutdown(wait=whole, cancel_futures=True)

    def is_worth_a_thread(self, plan: Plan, served: Served, given: Sequence[torch.Tensor]) -> bool:
        if self.in_flight is not None:
            return True
        if served.engine.advised == 1:
            return False
        # A quick one does not wait for those that are long.
        return not (plan.pace(given).quick and all(f.pace.quick for f, _ in self.waiting))

    def note(self, call: Call, found: Ready | None) -> None:
        """A call is made here. `found`: what serves it, if that was asked."""
        self.short = None if found is None else _plain_sizes(call)
        self.left = 0 if self.short is None else _TAKEN_FOR_SHORT

    def is_short(self, call: Call) -> bool:
        """Whether a call is taken for such a one, which nothing that is under way waits for."""
        if self.left == 0 or self.waiting or _plain_sizes(call) != self.short:
            return False
        self.left -= 1
        return True

    def begun(self, flight: Flight) -> bool:
        """Whether a thread computes it: none does after the main thread's end."""
        try:
            future = self.threads(flight).submit(_computed, flight)
        except RuntimeError as error:
            let_through(error)
            log.debug("no thread: %s", error)
            return False
        self.waiting.append((flight, future))
        return True

    def threads(self, flight: Flight) -> ThreadPoolExecutor:
        if self.pool is None:
            count = self.in_flight or flight.threads
            self.pool = ThreadPoolExecutor(count, thread_name_prefix="ovshim-map")
        return self.pool

    def here(self, found: Ready | None, call: Call) -> Any:
        """The module's answer, in this thread. `found`: what serves the call, if asked just now."""
        answered = None if found is None else _at_once(*found)
        if answered is not None:
            return answered[0]
        args, kwargs = call
        return self.module(*args, **kwargs)

    def landed(self, most: int) -> Iterator[Any]:
        """The answers of those that wait, until no more than so many do."""
        while len(self.waiting) > most:
            yield self.land(*self.waiting.popleft())

    def land(self, flight: Flight, future: Future[Any]) -> Any:
        """The module's answer: OpenVINO's, if a call made now would be answered by it."""
        try:
            computed = future.result()
            if flight.modes.hold() and flight.holds():
                return flight.answer(computed)
        except FAILURES as error:
            let_through(error)
            log.debug("computed ahead in vain: %s", error)
        return flight.call(self.module)


def _plain_sizes(call: Call) -> tuple[torch.Size, ...] | None:
    """Of the tensors of a call; None where it has other arguments, or names for them."""
    args, kwargs = call
    if kwargs or any(type(x) is not torch.Tensor for x in args):
        return None
    return tuple(x.shape for x in args)


def _calls(items: Iterable[Any]) -> Iterator[Call | Exception]:
    """The arguments that the items stand for; in the end the exception that there was, if any."""
    try:
        for item in items:
            yield as_call(item, None)
    except Exception as error:  # the user's own, to be raised at its turn
        yield error


# --- how long calls take --------------------------------------------------------------------------


def _computed(flight: Flight) -> list[torch.Tensor]:
    """In a thread: what OpenVINO computes. Raises one of FAILURES."""
    started = time.perf_counter()
    computed = flight.compute()
    flight.pace.took(time.perf_counter() - started, here=False)
    return computed


def _at_once(plan: Plan, served: Served, given: Sequence[torch.Tensor]) -> tuple[Any] | None:
    """The module's answer, by OpenVINO, in this thread; None where eager has to give it."""
    started = time.perf_counter()
    try:
        answer = served.answer(given)
    except FAILURES as error:
        let_through(error)
        log.debug("to be answered by eager: %s", error)
        return None
    plan.pace(given).took(time.perf_counter() - started, here=True)
    plan.calls.add()
    return (answer,)


# --- submit ---------------------------------------------------------------------------------------


class _Lanes:
    """The threads behind `submit`, for one module."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        # Under way, and not known to be quick: nothing is to be answered at once behind them.
        self.long: set[Flight] = set()
        self._eager = ThreadPoolExecutor(1, thread_name_prefix="ovshim-eager")
        self._turn = threading.RLock()  # where eager answers in other threads than that

    def pool(self, count: int) -> ThreadPoolExecutor:
        """Threads that compute; so many, if there are none yet."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(count, thread_name_prefix="ovshim-submit")
            return self._pool

    def in_eager(self, work: Callable[[], None]) -> None:
        """Have it done when eager has its turn."""

        def alone() -> None:
            with self._turn:
                work()

        _handed(self._eager, alone)


def _handed(pool: ThreadPoolExecutor, work: Callable[[], None]) -> None:
    """Have a thread of the pool do it; this one, where none can be had: after the main thread's
    end, or where there are too many."""
    todo = [work]

    def once() -> None:  # what the pool has refused for want of a thread is in its queue
        try:
            taken = todo.pop()
        except IndexError:
            return
        taken()

    try:
        pool.submit(once)
    except RuntimeError as error:
        let_through(error)
        log.debug("no thread: %s", error)
        once()


_lanes: weakref.WeakKeyDictionary[Any, _Lanes] = weakref.WeakKeyDictionary()
_lanes_lock = threading.Lock()
_inherited: list[Any] = []


def submitted(
    owner: object, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Future[Any]:
    """The future answer to a call; see `Handle.submit`.

    Args:
        owner: whose threads are used; they end with it.
    """
    future: Future[Any] = Future()
    lanes = _lanes_of(owner)
    found = ready(module, dispatcher_of(module), args, kwargs)
    if found is not None:
        plan, _, given = found
        pace = plan.pace(given)
        if pace.quick and not lanes.long:
            answered = _at_once(*found)
            if answered is not None:
                future.set_result(answered[0])
                return future
        flight = Flight(*found, (args, kwargs))
        if not pace.quick:
            lanes.long.add(flight)
        _handed(lanes.pool(flight.threads), lambda: _fly(flight, module, lanes, future))
    elif in_special_mode():
        _settle(future, lambda: module(*args, **kwargs))
    else:
        kept, modes = Kept((args, kwargs)), Modes()
        lanes.in_eager(lambda: _answer(module, kept, modes, future))
    return future


def _lanes_of(owner: object) -> _Lanes:
    with _lanes_lock:
        lanes = _lanes.get(owner)
        if lanes is None:
            lanes = _lanes[owner] = _Lanes()
        return lanes


def _fly(flight: Flight, module: nn.Module, lanes: _Lanes, future: Future[Any]) -> None:
    computed = None
    try:
        if not future.set_running_or_notify_cancel():
            return
        computed = _computed(flight)
    except FAILURES as error:
        log.debug("submitted in vain: %s", error)
    except BaseException as error:  # no memory is left, say: who waits has to be told
        future.set_exception(error)
        return
    finally:
        lanes.long.discard(flight)
    if computed is not None and flight.holds():
        _settle(future, lambda: flight.answer(computed))
    else:
        modes = flight.modes
        lanes.in_eager(lambda: _settle(future, lambda: modes.call(flight.call, module)))


def _answer(module: nn.Module, kept: Kept, modes: Modes, future: Future[Any]) -> None:
    if future.set_running_or_notify_cancel():
        _settle(future, lambda: modes.call(kept.call, module))


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # it reaches who asks for the result
        future.set_exception(error)


def _leave_lanes() -> None:
    """The threads of a forked child's parent are not there, and their queues lock up."""
    global _lanes, _lanes_lock
    _inherited.append(_lanes)
    _lanes = weakref.WeakKeyDictionary()
    _lanes_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_lanes)
