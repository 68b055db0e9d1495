"""Requests that are made only while no other one of the same model runs.

OpenVINO 2026.4 ends the process (a pure virtual call) when a request is made while another of the
same dynamic model runs. So each running call holds one of these, and whoever makes a request
gathers them all first. Held things are taken and given back by a list's own atomic operations: a
lock around each call would cost more than all of this.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Generic, TypeVar

from ovshim.helper import hot

__all__ = ["Pool", "ReenteredError"]

_GATHERING_SECONDS = 20e-6
# So many times of it and more, some tens of milliseconds, before it is asked who holds what is
# still waited for.
_PATIENCE = 256

T = TypeVar("T")
R = TypeVar("R")


class ReenteredError(RuntimeError):
    """Made from within a call of the same: by a signal handler, or where an object is freed."""


class Pool(Generic[T]):
    """What running calls hold.

    Args:
        holder: the code that holds one, which has the pool in a local variable by then.

    Attributes:
        free: those that wait; a call pops one, or takes one by `new` where there is none.
        back: the list that those which have run are appended to: `free`, but while all are
            gathered.
    """

    def __init__(self, holder: CodeType) -> None:
        self.free: list[T] = []
        self.back = self.free
        # Weakly: who gives one up has nothing to say.
        self._all: weakref.WeakSet[T] = weakref.WeakSet()
        self._holder = holder
        self._making = threading.RLock()

    def __len__(self) -> int:
        """How many there are, those that calls hold among them."""
        return len(self._all)

    def busy(self) -> bool:
        """Whether a call holds one."""
        return len(self.free) < len(self._all)

    def new(self, make: Callable[[], T]) -> T:
        """One for a call that has found none: one that has come back meanwhile, or a new one.

        Raises ReenteredError, and whatever `make` raises.
        """
        self._refuse_within(sys._getframe(2))  # the next one is the call itself
        with self._making:
            admitted = True  # noqa: F841 # read by `_is_inside`
            with contextlib.suppress(IndexError):
                return self.free.pop()
            return self._with_all(lambda gathered: self._one_more(gathered, make))

    def alone(self, work: Callable[[list[T]], R]) -> R:
        """What `work` gives, called while nobody holds any: no call runs. It is given them all;
        what it takes out of the list is let go. Raises ReenteredError, and whatever `work` raises.
        """
        self._refuse_within(sys._getframe(1))
        return self._with_all(work)

    def _one_more(self, gathered: list[T], make: Callable[[], T]) -> T:
        # As many again: the next threads need not wait for all the others.
        for _ in range(max(1, len(gathered))):
            made = make()
            self._all.add(made)
            gathered.append(made)
        return gathered.pop()

    def _with_all(self, work: Callable[[list[T]], R]) -> R:
        # No context manager: an interrupt on the way into its block would leave them gathered for
        # as long as anybody keeps the exception.
        with self._making:
            gathered: list[T] = []
            try:
                self._gather(gathered)
                return work(gathered)
            finally:
                self._give_back(gathered)

    def _refuse_within(self, frame: FrameType | None) -> None:
        """Raise where this thread holds one further down its stack: it would wait for itself, or
        for who waits for it. The stack is asked, for a note of who holds what would be a part of
        each call. (The compiled helper has no frame there, and notes it.)"""
        if hot is not None and threading.get_ident() in hot.holders(self):
            raise ReenteredError
        while frame is not None:
            if self._is_in(frame):
                raise ReenteredError
            frame = frame.f_back

    def _gather(self, gathered: list[T]) -> None:
        """Wait for all that there are. Raises ReenteredError."""
        if self.back is not self.free:  # by this thread, whose lock it is
            if self._is_gathering(sys._getframe(2)):
                raise ReenteredError
            self._give_back(self.back)  # an interrupt on the way into it has left them so
        self.back = gathered
        sleeps = unseen = 0
        while len(gathered) < len(self._all):
            try:
                gathered.append(self.free.pop())
            except IndexError:
                time.sleep(_GATHERING_SECONDS)
                sleeps += 1
                if sleeps % _PATIENCE == 0:
                    unseen = 0 if self._is_held() else unseen + 1
                    if unseen == 2:  # at the first look one may have been on its way back
                        self._all = weakref.WeakSet(gathered)

    def _is_held(self) -> bool:
        """Whether another thread's call holds one, or may. What is neither held nor here an
        interrupt has cost: it came as one was taken, and an exception that somebody keeps, with the
        frames of an earlier call, keeps that one alive."""
        if hot is not None and hot.holders(self):
            return True
        own = threading.get_ident()
        frames = sys._current_frames()
        return any(self._is_inside(top) for thread, top in frames.items() if thread != own)

    def _is_inside(self, frame: FrameType | None) -> bool:
        """Whether a stack is inside of a call that has not been told to wait here."""
        waits = False
        while frame is not None:
            if not waits and self._is_in(frame):
                return True
            waits = frame.f_code is Pool.new.__code__ and "admitted" not in frame.f_locals
            frame = frame.f_back
        return False

    def _is_in(self, frame: FrameType) -> bool:
        """Whether it is a call's that holds one, or takes or gives back one just now."""
        return frame.f_code is self._holder and any(v is self for v in frame.f_locals.values())

    def _is_gathering(self, frame: FrameType | None) -> bool:
        """Whether this thread is about it further down its stack."""
        while frame is not None:
            if frame.f_code is Pool._with_all.__code__ and frame.f_locals.get("self") is self:
                return True
            frame = frame.f_back
        return False

    def _give_back(self, gathered: list[T]) -> None:
        if self.back is gathered:
            self.back = self.free
        self.free.extend(gathered)
