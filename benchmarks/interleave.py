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

from quiet import Delay

__all__ = ["Effort", "Ratio", "Turns", "compare", "interleave"]

# A sample lasts at least this long, in a loop where one call does not: neither the clock nor one
# interruption shall decide it.
_SAMPLE_SECONDS = 0.020
# Threads of the way before (libgomp's, ONNX Runtime's) spin for some milliseconds after their last
# call. Without this pause each sample would measure its predecessor's thread pool as well.
_PAUSE_SECONDS = 0.010
# Calls before the clock starts: they wake a way's own threads and fill the caches. One call does
# not fill the third level with weights of int8 that just fit into it.
_LEAD_SECONDS = 0.010
# To a call of this length neither matters.
_LONG_SECONDS = 0.1
_WARM_SECONDS = 0.2
# Our threads may have waited for a processor for this share of what was timed.
_DELAY_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure one group: `seconds`, within these numbers of rounds.

    A measurement that looks disturbed is repeated, up to `attempts` in all. `patience`: the seconds
    that may go into waiting for a quiet machine, and as many into rounds that are thrown away.
    """

    seconds: float
    fewest: int
    most: int
    attempts: int
    patience: float


@dataclasses.dataclass(frozen=True)
class Turns:
    """What taking turns has given.

    Attributes:
        samples: seconds a call, by way; sample i of each belongs to round i.
        disturbed: rounds among them in which others took processor time from us.
        dropped: rounds that were thrown away for that.
        attempts: measurements of which this is the best.
    """

    samples: dict[str, list[float]]
    disturbed: int = 0
    dropped: int = 0
    attempts: int = 1


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


def interleave(ways: Mapping[str, Callable[[], Any]], effort: Effort) -> Turns:
    """One sample per way and round.

    Each round runs every way once, in an order shuffled by a fixed seed, so that what disturbs the
    machine for a while disturbs all, and nobody always follows the same other. A round in which our
    threads had to wait for a processor is thrown away, while there is patience for that.
    """
    loops = {name: _loops(way) for name, way in ways.items()}
    kept: list[dict[str, float]] = []
    order, shuffle = list(ways), random.Random(0).shuffle
    spent = wasted = 0.0
    disturbed = dropped = 0
    gc.collect()
    gc.disable()
    try:
        while len(kept) < effort.most and (len(kept) < effort.fewest or spent < effort.seconds):
            shuffle(order)
            delay, started = Delay(), time.perf_counter()
            taken = {name: _sample(ways[name], *loops[name], delay) for name in order}
            seconds = time.perf_counter() - started
            timed = sum(taken[name] * loops[name][1] for name in order)
            quiet = delay.seconds <= _DELAY_SHARE * timed
            if not quiet and wasted < effort.patience:
                wasted += seconds
                dropped += 1
                continue
            spent += seconds
            disturbed += not quiet
            kept.append(taken)
    finally:
        gc.enable()
    samples = {name: [taken[name] for taken in kept] for name in ways}
    return Turns(samples, disturbed, dropped)


def _loops(way: Callable[[], Any]) -> tuple[int, int]:
    """Untimed and timed calls of a sample, after calls that let it allocate and compile."""
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < _WARM_SECONDS:
        times.append(_time(way, 1))
    typical = statistics.median(times)
    lead = 0 if typical > _LONG_SECONDS else math.ceil(_LEAD_SECONDS / typical)
    return lead, max(1, math.ceil(_SAMPLE_SECONDS / typical))


def _sample(way: Callable[[], Any], lead: int, timed: int, delay: Delay) -> float:
    time.sleep(_PAUSE_SECONDS)
    for _ in range(lead):
        way()
    delay.start()
    seconds = _time(way, timed)
    delay.stop()
    return seconds


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
