"""`Batcher`: single calls of many threads, gathered into batches.

The first call of its sort waits a little for others that are alike, computes all of them at once,
and hands each its rows. That is done in the callers' own threads; there is no other, so nothing has
to be ended when a program forks or exits. What cannot be gathered is called as it is, in the thread
that wants it: then the answer, the exception and the modes are those of a plain call.
"""

from __future__ import annotations

import contextlib
import logging
import math
import numbers
import os
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from ovshim.bound import installed
from ovshim.dispatch import Dispatcher
from ovshim.errors import OptionError
from ovshim.plan import Served
from ovshim.serve import sizing
from ovshim.serve.alike import Call, NoPlanError, Rows, call_of
from ovshim.serve.flight import FAILURES, dispatcher_of
from ovshim.signals import comes_here, let_through

__all__ = ["Batcher"]

log = logging.getLogger("ovshim")

_KEYS = ("calls", "batched", "batches")
_CLOSED = "This Batcher is closed. Make another one."
# How often `close` looks whether the main thread's call is over: that one notifies nobody.
_MAIN_SECONDS = 0.01


class _Group:
    """Calls that will be computed together; the first one's thread does it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.calls: list[Call] = []
        self.rows = 0
        self.closed = False
        self.runs = 0

    def takes(self, call: Call) -> bool:
        return not self.closed and self.rows + call.rows <= self.limit

    def add(self, call: Call) -> None:
        self.calls.append(call)
        self.rows += call.rows
        self.closed = self.rows >= self.limit


class Batcher:
    """Answers single calls of many threads by batches.

        with ovshim.serve.Batcher(fast, max_batch=32, max_delay=0.005) as batcher:
            ...  # in any thread, under torch.inference_mode():
            y = batcher(x)

    A call's tensors have their rows in dimension 0, one or more; so have its outputs, each of which
    belongs to the caller alone. Only calls that are alike are gathered: the same structure, dtypes,
    constants, modes, and sizes but for the rows. Before the calls of a plan are gathered, and again
    on the first real batches, it is checked that each row depends on itself alone. What cannot be
    gathered is answered as by `fast(...)`: calls that eager serves, modules whose outputs do not
    have the batch in dimension 0 or whose rows depend on each other, and those of the main thread,
    which a signal may end anywhere.

    Args:
        fast: an accelerated module.
        max_batch: the most rows in a batch; "auto": as many as a measurement at the first call
            finds to pay, within the memory there is.
        max_delay: seconds that a call may wait for others.

    Raises:
        OptionError: a value that cannot be right, or a module accelerated for one batch size.
    """

    def __init__(
        self,
        fast: nn.Module,
        *,
        max_batch: int | Literal["auto"] = "auto",
        max_delay: float = 0.002,
    ) -> None:
        self._dispatcher = _checked(fast, max_batch, max_delay)
        self._fast = fast
        self._max_batch = max_batch
        self._max_delay = float(max_delay)
        self._rows: weakref.WeakKeyDictionary[Served, Rows] = weakref.WeakKeyDictionary()
        self._closed = False
        self._reset()
        _batchers.add(self)

    def _reset(self) -> None:
        # Guards everything below, and is notified when any of it changes.
        self._changed = threading.Condition()
        self._learning = threading.Lock()
        self._groups: dict[Any, _Group] = {}
        self._running = 0
        self._inside = 0
        # The main thread's calls that are under way, and all of them.
        self._in_main = self._by_main = 0
        self._counts = dict.fromkeys(_KEYS, 0)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """What `fast(*args, **kwargs)` answers.

        Raises what that raises, and RuntimeError once the batcher is closed.
        """
        if comes_here():
            return self._alone(args, kwargs)
        with self._entered():
            call = call_of(self._fast, self._dispatcher, args, kwargs)
            if call is not None:
                limit = self._limit(call)
                if call.rows < limit and self._gathered(call, limit):
                    return call.answer()
            return self._fast(*args, **kwargs)

    def close(self) -> None:
        """Take no more calls, and wait until those under way are answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self._inside > 0 or (self._in_main > 0 and not comes_here()):
                self._changed.wait(_MAIN_SECONDS if self._in_main else None)

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def stats(self) -> dict[str, int]:
        """Number of calls, of those among them that shared a batch, and of batches."""
        with self._changed:
            return {**self._counts, "calls": self._counts["calls"] + self._by_main}

    def _alone(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the main thread's. What a signal's handler raises may end it anywhere, and with
        it a batch that others wait for, or a lock that nobody would ever give back: so it joins no
        batch, and takes no lock."""
        if self._closed:
            raise RuntimeError(_CLOSED)
        before = self._in_main
        try:
            self._in_main = before + 1
            self._by_main += 1
            return self._fast(*args, **kwargs)
        finally:
            self._in_main = before

    # --- gathering ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        with self._changed:
            if self._closed:
                raise RuntimeError(_CLOSED)
            self._inside += 1
            self._counts["calls"] += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def _gathered(self, call: Call, limit: int) -> bool:
        """Whether the call has been computed, with others."""
        with self._changed:
            group = self._groups.get(call.key)
            leads = group is None or not group.takes(call)
            if group is None or leads:
                if group is not None:
                    group.closed = True
                group = self._groups[call.key] = _Group(limit)
            group.add(call)
            self._changed.notify_all()
        if not leads:
            call.done.wait()
            return call.part is not None
        try:
            self._wait(group)
            if len(group.calls) > 1:
                self._compute(group)
        finally:
            self._end(group)
        return call.part is not None

    def _wait(self, group: _Group) -> None:
        """Until the group is full or has waited long enough, and there is room to compute it."""
        deadline = time.monotonic() + self._max_delay
        advised = group.calls[0].advised
        with self._changed:
            while not (group.closed or self._closed):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            # Whoever comes while others compute still joins.
            self._changed.wait_for(lambda: self._running < advised)
            self._close(group)
            group.runs = 1
            self._running += 1

    def _close(self, group: _Group) -> None:
        group.closed = True
        key = group.calls[0].key
        if self._groups.get(key) is group:
            del self._groups[key]

    def _compute(self, group: _Group) -> None:
        calls = group.calls
        rows = self._rows.get(calls[0].served)
        try:
            done = rows is not None and rows.compute(calls)
        except (NoPlanError, *FAILURES) as error:
            let_through(error)
            # One of them may be at fault: each finds out for itself whether it is the one.
            log.debug("a batch of %d calls is given up: %s", len(calls), error)
            return
        if done:
            with self._changed:
                self._counts["batches"] += 1
                self._counts["batched"] += len(calls)

    def _end(self, group: _Group) -> None:
        with self._changed:
            self._close(group)
            self._running -= group.runs
            self._changed.notify_all()
        for call in group.calls:
            call.done.set()

    # --- learning -----------------------------------------------------------------------------

    def _limit(self, call: Call) -> int:
        """The most rows in a batch of such calls; 1 where they cannot be gathered."""
        rows = self._rows.get(call.served)
        if rows is None:
            with self._learning:
                rows = self._rows.get(call.served) or self._learnt(call)
        return rows.limit if rows is not None and rows.apart else 1

    def _learnt(self, call: Call) -> Rows | None:
        try:
            tolerance = self._dispatcher.options.tolerance_for(call.plan.precision)
            rows = Rows(call, tolerance)
            if rows.apart and self._max_batch == "auto":
                rows.limit = sizing.best_size(call.seconds, sizing.free_memory)
                log.info("batches of up to %d rows", rows.limit)
        except (NoPlanError, *FAILURES) as error:
            let_through(error)
            log.debug("nothing was learnt of batches: %s", error)
            return None
        if self._max_batch != "auto":
            rows.limit = self._max_batch
        if not rows.apart:
            name = type(self._fast).__qualname__
            log.warning("calls of %s share no batches: their rows are not apart", name)
        self._rows[call.served] = rows
        return rows


def _checked(fast: Any, max_batch: Any, max_delay: Any) -> Dispatcher:
    """What serves the module. Raises OptionError."""
    methods = installed(fast) if isinstance(fast, nn.Module) else {}
    if not methods:
        remedy = "Give what ovshim.accelerate returns."
        raise OptionError("fast", fast, "an accelerated module", remedy)
    dispatcher = dispatcher_of(fast)
    if dispatcher is None:
        remedy = "Batches are of calls of the module itself: add 'forward' to its methods."
        raise OptionError("methods", tuple(methods), "names with 'forward' among them", remedy)
    if not dispatcher.options.dynamic_batch and dispatcher.options.dynamic_shapes is None:
        remedy = "Accelerate it with dynamic_batch=True, or call it without a Batcher."
        raise OptionError("dynamic_batch", False, "True for a module served in batches", remedy)
    number = isinstance(max_batch, numbers.Integral) and not isinstance(max_batch, bool)
    if max_batch != "auto" and not (number and max_batch >= 1):
        remedy = "Give the most rows that a batch may have, for example 32."
        raise OptionError("max_batch", max_batch, "a whole number above 0 or 'auto'", remedy)
    real = isinstance(max_delay, numbers.Real) and not isinstance(max_delay, bool)
    if not real or not 0 <= max_delay < math.inf:
        remedy = "Give the seconds that a call may wait for others, for example 0.002."
        raise OptionError("max_delay", max_delay, "a finite number of seconds, 0 or more", remedy)
    return dispatcher


_batchers: weakref.WeakSet[Batcher] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for batcher in list(_batchers):
        batcher._reset()  # the threads that waited are not in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
