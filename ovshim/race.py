"""Which of several ways is faster, measured in interleaved rounds."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Finish", "race", "rounds"]

# A sample lasts at least this long, so that the clock and one interruption do not decide it, nor
# its first calls, for which the other one has emptied the caches: in samples of 0.2 ms a module of
# 34 us took 37.
_SAMPLE_SECONDS = 1e-3
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 41


@dataclasses.dataclass(frozen=True)
class Finish:
    """How a race came out.

    Attributes:
        eager, candidate: medians, in seconds a call.
        low, high: quartiles of the rounds' ratios eager / candidate. Both above 1 or both below:
            the race is decided. Otherwise something disturbed it, or there is nothing to choose.
    """

    eager: float
    candidate: float
    low: float
    high: float

    @staticmethod
    def of(eager: Sequence[float], candidate: Sequence[float]) -> Finish:
        """The finish of rounds that took these seconds, sample i of each in round i."""
        ratios = [mine / other for mine, other in zip(eager, candidate, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        return Finish(statistics.median(eager), statistics.median(candidate), low, high)

    def to_json(self) -> list[float]:
        """As entries keep it."""
        return list(dataclasses.astuple(self))

    @staticmethod
    def of_json(stored: Any) -> Finish | None:
        """None where it is nothing of the sort."""
        if not isinstance(stored, list) or len(stored) != 4:
            return None
        return Finish(*stored) if all(isinstance(number, float) for number in stored) else None

    @property
    def decided(self) -> bool:
        return self.low > 1.0 or self.high < 1.0

    @property
    def lost(self) -> bool:
        """Whether eager is the faster one beyond doubt: on a busy machine a single bad minute must
        not keep a plan from serving for good."""
        return self.high < 1.0


def race(eager: Callable[[], Any], candidate: Callable[[], Any], budget: float) -> Finish:
    """Let both run.

    Args:
        budget: seconds that the whole race should take; a few rounds are run in any case.
    """
    samples = rounds((eager, candidate), budget)
    return Finish.of(*samples)


def rounds(
    ways: Sequence[Callable[[], Any]], budget: float, fewest: int = _FEWEST_ROUNDS
) -> list[list[float]]:
    """Seconds a call, of each way in each round.

    In a round all run, in an order that turns around from round to round: what slows the machine
    down for a while slows all. Their number adapts to the calls' own time.

    Args:
        budget: seconds that it all should take; but `fewest` rounds are run in any case.
    """
    repeats = []
    for way in ways:
        way()  # the first call allocates, packs weights and warms caches
        spent = _time(way, 1)
        repeats.append(max(1, round(_SAMPLE_SECONDS / max(spent, 1e-7))))
    samples: list[list[float]] = [[] for _ in ways]
    order = range(len(ways))
    started = time.perf_counter()
    for n in range(_MOST_ROUNDS):
        if n >= fewest and time.perf_counter() - started > budget:
            break
        for which in order if n % 2 else reversed(order):
            samples[which].append(_time(ways[which], repeats[which]))
    return samples


def _time(call: Callable[[], Any], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats
