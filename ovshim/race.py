"""Which of two ways is faster, measured in interleaved rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

__all__ = ["race"]

# A sample lasts at least this long, so that the clock and one interruption do not decide it.
_SAMPLE_SECONDS = 200e-6
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 41


def race(
    eager: Callable[[], Any], candidate: Callable[[], Any], budget: float
) -> tuple[float, float]:
    """Medians of both, in seconds a call.

    Rounds alternate between the two, and so does who goes first: what slows the machine down for a
    while slows both. Their number adapts to the calls' own time.

    Args:
        budget: seconds that the whole race should take; a few rounds are run in any case.
    """
    ways = (eager, candidate)
    repeats = []
    for way in ways:
        way()  # the first call allocates, packs weights and warms caches
        spent = _time(way, 1)
        repeats.append(max(1, round(_SAMPLE_SECONDS / max(spent, 1e-7))))
    samples: tuple[list[float], list[float]] = ([], [])
    started = time.perf_counter()
    for n in range(_MOST_ROUNDS):
        if n >= _FEWEST_ROUNDS and time.perf_counter() - started > budget:
            break
        for which in (0, 1) if n % 2 else (1, 0):
            samples[which].append(_time(ways[which], repeats[which]))
    return statistics.median(samples[0]), statistics.median(samples[1])


def _time(call: Callable[[], Any], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats
