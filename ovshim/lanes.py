"""Lanes: who serves the calls of one bucket of sizes, OpenVINO or eager.

A plan is proved at a few sizes and raced at one. When calls of another bucket come, the first is
answered by both and compared, and, unless OpenVINO is preferred anyway, the next take turns and are
timed: the race costs nobody a call. What was found is kept with the entry.

Long calls take turns one by one. Short ones do by the clock, all lanes at once: the threads of the
one spin on for a while beside the other's calls, which take up to twice as long then, and both
would be measured as they are only while they take turns.
"""

from __future__ import annotations

import statistics
import time
from typing import Literal

from ovshim.race import Finish

__all__ = ["Lane", "Turn"]

# Pairs of calls, one by each, after which the one to serve is chosen. The first pair is left out:
# kernels for these sizes are chosen in it, and memory taken.
_PAIRS = 8
# Calls below this are short; who answers them changes so often, and what comes in the first part of
# such a time is not counted.
_SHORT_SECONDS = 1e-3
_WINDOW_SECONDS, _FIRST_PART = 4e-3, 0.25

Turn = Literal["both", "eager", "openvino"]


class Lane:
    """The calls of one bucket.

    Args:
        proved: whether calls of this bucket have been compared with eager.
        raced: whether who serves is settled; `eager` says for whom.

    Attributes:
        open: whether OpenVINO serves and nothing is left to find out: the hot path's one question.
        eager: whether eager is faster here.
    """

    __slots__ = ("_last", "_samples", "_seldom", "_short", "_window", "eager", "open", "proved")

    def __init__(self, proved: bool, raced: bool, eager: bool = False) -> None:
        self.proved = proved
        self.eager = eager
        self.open = proved and raced and not eager
        self._samples: tuple[list[float], list[float]] | None = None if raced else ([], [])
        # Whether calls are short, and whether this one comes so late after the last, which ended
        # then, that nobody's threads spin any more.
        self._short, self._seldom, self._last = False, False, 0.0
        # The last window that a short call was counted in, and what such calls took.
        self._window: tuple[int, list[float]] = -1, []

    def turn(self) -> Turn:
        """Who answers the next call."""
        if self.eager:
            return "eager"
        if not self.proved:
            return "both"
        samples = self._samples
        if samples is None:
            return "openvino"
        if self._short:
            now = time.perf_counter()
            self._seldom = now - self._last >= _WINDOW_SECONDS
            if not self._seldom:
                return "openvino" if int(now / _WINDOW_SECONDS) % 2 else "eager"
        return "openvino" if len(samples[0]) >= len(samples[1]) else "eager"

    def passed(self) -> None:
        """A call was answered by both, and alike."""
        self.proved = True
        self.open = self._samples is None and not self.eager

    def timed(self, turn: Turn, seconds: float) -> Finish | None:
        """Take the time of a call; returns how the race came out when it is over.

        Threads may do so at once: samples are paired by their order, which is all that matters."""
        samples = self._samples
        if samples is None or turn == "both":
            return None
        self._last = time.perf_counter()
        if self._short and not self._seldom and seconds < _WINDOW_SECONDS:
            self._count(samples, turn, seconds)
        else:
            samples[turn == "openvino"].append(seconds)
            # Of the first pair, which is left out in any case.
            first = min(map(len, samples)) == 1
            self._short = self._short or (first and seconds < _SHORT_SECONDS)
        if min(map(len, samples)) <= _PAIRS:
            return None
        finish = Finish.of(*(own[1 : _PAIRS + 1] for own in samples))
        self._samples = None
        self.eager = finish.lost
        self.open = not finish.lost
        return finish

    def _count(self, samples: tuple[list[float], list[float]], turn: Turn, seconds: float) -> None:
        """A short call: the sample is the median of all that come in one window."""
        window, part = divmod(time.perf_counter() / _WINDOW_SECONDS, 1.0)
        known, calls = self._window
        if part < _FIRST_PART or (window % 2 == 1.0) is not (turn == "openvino"):
            return
        if window != known:
            if calls:
                samples[known % 2 == 1].append(statistics.median(calls))
            self._window = int(window), [seconds]
        else:
            calls.append(seconds)
