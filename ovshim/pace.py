"""How long calls take: whether another thread is worth waking for them."""

from __future__ import annotations

import math

__all__ = ["Pace"]

# Below this a computation is over before another thread is awake.
_WORTH_A_THREAD_SECONDS = 150e-6
# What takes so long in another thread may be as quick as that: much of it may have been waiting for
# Python's lock, which a caller that submits one call after the other keeps for 5 ms at a time.
_WORTH_A_TRY_SECONDS = 10e-3
_TRIES = 5


class Pace:
    """What calls of one plan and bucket have taken. Nothing but interruptions makes them longer
    than they are, so the shortest one counts, and what was quick once is quick."""

    __slots__ = ("_shortest", "_tries")

    def __init__(self) -> None:
        self._shortest = math.inf
        self._tries = _TRIES

    def took(self, seconds: float, here: bool) -> None:
        """A call took so long; `here`: in the thread that made it."""
        if seconds < self._shortest:
            self._shortest = seconds
        if here and self._tries:
            self._tries -= 1

    @property
    def quick(self) -> bool:
        """Whether to make the next one in the thread that asks for it: it is over sooner than
        another thread would have begun, or that is to be found out."""
        if self._shortest < _WORTH_A_THREAD_SECONDS:
            return True
        return self._tries > 0 and self._shortest < _WORTH_A_TRY_SECONDS
