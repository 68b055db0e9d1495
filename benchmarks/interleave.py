"""Several ways to do the same, timed in turns within one process."""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Effort", "Ratio", "compare", "interleave"]

# A sample lasts at least this long, in a loop where one call does not: neither the clock nor one
# interruption shall decide it.
_SAMPLE_SECONDS = 0.005
# Threads of the way before (libgomp's, ONNX Runtime's) spin for some milliseconds after their last
# call. Without this pause each sample would measure its predecessor's thread pool as well.
_PAUSE_SECONDS = 0.010
# Calls before the clock starts: they wake a way's own threads and fill the caches.
_LEAD_SECONDS = 0.003
# To a call of this length neither matters.
_LONG_SECONDS = 0.1
_WARM_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure one group: `seconds`, within these numbers of rounds.

    A measurement that looks disturbed is repeated, up to `attempts` in all.
    """

    seconds: float
    fewest: int
    most: int
    attempts: int


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as fast as a reference: ratio of medians, quartiles of ratios by round."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.low)}–{_short(self.high)})"


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def interleave(ways: Mapping[str, Callable[[], Any]], effort: Effort) -> dict[str, list[float]]:
    """Seconds a call, one sample per way and round. Sample i of each way belongs to round i.

    Each round runs every way once, in an order shuffled by a fixed seed, so that what disturbs the
    machine for a while disturbs all, and nobody always follows the same other.
    """
    loops = {name: _loops(way) for name, way in ways.items()}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    order, shuffle = list(ways), random.Random(0).shuffle
    started = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for done in range(effort.most):
            if done >= effort.fewest and time.perf_counter() - started > effort.seconds:
                break
            shuffle(order)
            for name in order:
                samples[name].append(_sample(ways[name], *loops[name]))
    finally:
        gc.enable()
    return samples


def _loops(way: Callable[[], Any]) -> tuple[int, int]:
    """Untimed and timed calls of a sample, after calls that let it allocate and compile."""
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < _WARM_SECONDS:
        times.append(_time(way, 1))
    typical = statistics.median(times)
    lead = 0 if typical > _LONG_SECONDS else math.ceil(_LEAD_SECONDS / typical)
    return lead, max(1, math.ceil(_SAMPLE_SECONDS / typical))


def _sample(way: Callable[[], Any], lead: int, timed: int) -> float:
    time.sleep(_PAUSE_SECONDS)
    for _ in range(lead):
        way()
    return _time(way, timed)


def _time(way: Callable[[], Any], calls: int) -> float:
    loop = range(calls)
    started = time.perf_counter()
    for _ in loop:
        way()
    return (time.perf_counter() - started) / calls


def compare(reference: Sequence[float], mine: Sequence[float]) -> Ratio:
    """How many times as fast `mine` is, from samples of the same rounds."""
    by_round = [r / m for r, m in zip(reference, mine, strict=True)]
    low, _, high = statistics.quantiles(by_round, n=4, method="inclusive")
    return Ratio(statistics.median(reference) / statistics.median(mine), low, high)
