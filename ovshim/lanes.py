"""Lanes: who serves the calls of one bucket of sizes, OpenVINO or eager.

A plan is proved at a few sizes and raced at one. When calls of another bucket come, the first is
answered by both and compared, and, unless OpenVINO is preferred anyway, the next take turns and are
timed: the race costs nobody a call. What was found is kept with the entry.
"""

from __future__ import annotations

from typing import Literal

from ovshim.race import Finish

__all__ = ["Lane", "Turn"]

# Pairs of calls, one by each, after which the one to serve is chosen. The first pair is left out:
# kernels for these sizes are chosen in it, and memory taken.
_PAIRS = 8

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

    __slots__ = ("_samples", "eager", "open", "proved")

    def __init__(self, proved: bool, raced: bool, eager: bool = False) -> None:
        self.proved = proved
        self.eager = eager
        self.open = proved and raced and not eager
        self._samples: tuple[list[float], list[float]] | None = None if raced else ([], [])

    def turn(self) -> Turn:
        """Who answers the next call."""
        if self.eager:
            return "eager"
        if not self.proved:
            return "both"
        samples = self._samples
        if samples is None or len(samples[0]) >= len(samples[1]):
            return "openvino"
        return "eager"

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
        samples[turn == "openvino"].append(seconds)
        if min(map(len, samples)) <= _PAIRS:
            return None
        finish = Finish.of(*(own[1 : _PAIRS + 1] for own in samples))
        self._samples = None
        self.eager = finish.lost
        self.open = not finish.lost
        return finish
