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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from ovshim.errors import OptionError
from ovshim.example import as_call
from ovshim.serve.flight import FAILURES, Call, Flight, Kept, Modes, dispatcher_of, take_off
from ovshim.special_mode import in_special_mode

__all__ = ["in_order", "submitted"]

log = logging.getLogger("ovshim")

# Below this a computation is over before another thread is awake.
_WORTH_A_THREAD_SECONDS = 150e-6
# So many calls a thread may have been made of which nobody has taken the answers: where one of them
# is held up, the other threads go on.
_AHEAD = 2
# One or two long calls among short ones were interrupted, not long.
_LONG_CALLS = 3


# --- map ------------------------------------------------------------------------------------------


def in_order(module: nn.Module, items: Iterable[Any], in_flight: int | None) -> Iterator[Any]:
    """The module's answers to the items; see `Handle.map`.

    Raises:
        OptionError: `in_flight` is no count.
    """
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
        # Whether nothing is gained by more than one at once: for good, and as it seems now.
        self.single = in_flight == 1
        self.alone = self.single
        self.long = 0  # calls, one after the other, that might have had a thread

    def answers(self, items: Iterable[Any]) -> Iterator[Any]:
        """What the module answers to each. Raises at an item's turn what it raises."""
        try:
            for call in _calls(items):
                if isinstance(call, Exception):
                    yield from self.landed(0)
                    raise call
                flight = None if self.alone else self.take_off(call)
                if flight is not None:
                    self.waiting.append((flight, self.threads(flight).submit(self.compute, flight)))
                    yield from self.landed(_AHEAD * (self.in_flight or flight.threads))
                else:
                    # Eager's turn comes when all before it have had theirs; and nothing is read
                    # ahead beyond it, for what it does may decide what comes after.
                    if self.waiting:
                        yield from self.landed(0)
                    yield self.plainly(call)
            yield from self.landed(0)
        finally:
            if self.pool is not None:
                self.pool.shutdown(cancel_futures=True)

    def take_off(self, call: Call) -> Flight | None:
        flight = take_off(self.module, self.dispatcher, *call)
        if flight is not None and self.in_flight is None and flight.advised == 1:
            self.single = self.alone = True
            return None
        return flight

    def threads(self, flight: Flight) -> ThreadPoolExecutor:
        if self.pool is None:
            count = self.in_flight or flight.threads
            self.pool = ThreadPoolExecutor(count, thread_name_prefix="ovshim-map")
        return self.pool

    def compute(self, flight: Flight) -> list[torch.Tensor]:
        """In a thread of the pool."""
        started = time.perf_counter()
        computed = flight.compute()
        if self.in_flight is None and time.perf_counter() - started < _WORTH_A_THREAD_SECONDS:
            self.alone = True
        return computed

    def plainly(self, call: Call) -> Any:
        args, kwargs = call
        started = time.perf_counter()
        answer = self.module(*args, **kwargs)
        long = time.perf_counter() - started > 2 * _WORTH_A_THREAD_SECONDS
        self.long = self.long + 1 if long else 0
        if self.long == _LONG_CALLS:
            self.alone, self.long = self.single, 0
        return answer

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
            log.debug("computed ahead in vain: %s", error)
        return flight.call(self.module)


def _calls(items: Iterable[Any]) -> Iterator[Call | Exception]:
    """The arguments that the items stand for; in the end the exception that there was, if any."""
    try:
        for item in items:
            yield as_call(item, None)
    except Exception as error:  # the user's own, to be raised at its turn
        yield error


# --- submit ---------------------------------------------------------------------------------------


class _Lanes:
    """The threads behind `submit`, for one module."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self.eager = ThreadPoolExecutor(1, thread_name_prefix="ovshim-eager")

    def pool(self, count: int) -> ThreadPoolExecutor:
        """Threads that compute; so many, if there are none yet."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(count, thread_name_prefix="ovshim-submit")
            return self._pool


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
    flight = take_off(module, dispatcher_of(module), args, kwargs)
    if flight is not None:
        lanes.pool(flight.threads).submit(_fly, flight, module, lanes, future)
    elif in_special_mode():
        _settle(future, lambda: module(*args, **kwargs))
    else:
        lanes.eager.submit(_answer, module, Kept((args, kwargs)), Modes(), future)
    return future


def _lanes_of(owner: object) -> _Lanes:
    with _lanes_lock:
        lanes = _lanes.get(owner)
        if lanes is None:
            lanes = _lanes[owner] = _Lanes()
        return lanes


def _fly(flight: Flight, module: nn.Module, lanes: _Lanes, future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        computed = flight.compute()
    except FAILURES as error:
        log.debug("submitted in vain: %s", error)
        computed = None
    if computed is not None and flight.holds():
        _settle(future, lambda: flight.answer(computed))
    else:
        modes = flight.modes
        lanes.eager.submit(_settle, future, lambda: modes.call(flight.call, module))


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
