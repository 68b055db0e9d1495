"""Hands measurements that exist already to pytest-benchmark's fixture.

The fixture times one function at a time, so it cannot take turns between backends. But it lets a
test choose its clock: ours moves only when a recorded sample is played, by that sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["clock", "play"]


class _Clock:
    """A clock that stands still until it is told to advance."""

    __name__ = "recorded"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


clock = _Clock()
"""For `pytest.mark.benchmark(timer=...)` of every test that calls `play`."""


def play(benchmark: Any, samples: Sequence[float]) -> None:
    """Give the fixture these samples, in seconds a call, as its rounds.

    Each is played from 0, so that the clock's resolution does not fall while it advances.
    """
    following: Iterator[float] = iter(samples)

    def rewind() -> None:
        clock.now = 0.0

    def advance() -> None:
        clock.now = next(following)

    benchmark.pedantic(advance, setup=rewind, rounds=len(samples))
