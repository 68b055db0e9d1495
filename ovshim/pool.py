"""Requests that are made only while no other one of the same model runs.

OpenVINO 2026.4 ends the process (a pure virtual call) when a request is made while another of the
same dynamic model runs. So each running call holds one of these, and whoever makes a request
gathers them all first. Held things are taken and given back by a list's own atomic operations: a
lock around each call would cost more than all of this.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

__all__ = ["Pool"]

_GATHERING_SECONDS = 20e-6

T = TypeVar("T")


class Pool(Generic[T]):
    """What running calls hold.

    Attributes:
        free: those that wait; a call pops one, or takes one by `new` where there is none.
        back: the list that those which have run are appended to: `free`, but while all are
            gathered.
    """

    def __init__(self) -> None:
        self.free: list[T] = []
        self.back = self.free
        # Weakly, so that one is never waited for that an interrupt has cost.
        self._all: weakref.WeakSet[T] = weakref.WeakSet()
        self._making = threading.Lock()

    def new(self, make: Callable[[], T]) -> T:
        """One for a call that has found none: one that has come back meanwhile, or a new one.

        Raises whatever `make` raises.
        """
        with self._making:
            with contextlib.suppress(IndexError):
                return self.free.pop()
            with self._gathered() as gathered:
                # As many again: the next threads need not wait for all the others.
                for _ in range(max(1, len(gathered))):
                    made = make()
                    self._all.add(made)
                    gathered.append(made)
                return gathered.pop()

    @contextlib.contextmanager
    def alone(self) -> Iterator[list[T]]:
        """Inside, nobody holds any: no call runs. Gives them all; what is taken out of the list is
        let go."""
        with self._making, self._gathered() as gathered:
            yield gathered

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[list[T]]:
        gathered: list[T] = []
        self.back = gathered
        try:
            while len(gathered) < len(self._all):
                try:
                    gathered.append(self.free.pop())
                except IndexError:
                    time.sleep(_GATHERING_SECONDS)
            yield gathered
        finally:
            self.back = self.free
            self.free.extend(gathered)
