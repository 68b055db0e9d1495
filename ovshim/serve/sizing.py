"""How many rows a batch should have: found by measuring, within what memory there is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

__all__ = ["best_size", "free_memory", "seconds_of"]

_LARGEST = 256
# Twice the rows are worth waiting for if they bring so much more of them through in a second.
_WORTH_DOUBLING = 1.1
# Nobody waits longer than this for others' rows to be computed.
_LONGEST_SECONDS = 0.25
_TRIES = 3


def best_size(
    seconds: Callable[[int], float], memory: Callable[[], int | None], largest: int = _LARGEST
) -> int:
    """The number of rows from which more bring next to nothing: 1, 2, 4, ... up to `largest`.

    Args:
        seconds: what a batch of so many rows takes.
        memory: bytes that are free at the moment; None where that is not known.
    """
    size, spent = 1, seconds(1)
    while 2 * size <= largest and 2 * spent <= _LONGEST_SECONDS:
        before = memory()
        doubled = seconds(2 * size)
        if 2 * spent < _WORTH_DOUBLING * doubled:
            break
        size, spent = 2 * size, doubled
        after = memory()
        # The next step would take about twice what this one took.
        if before is not None and after is not None and 2 * (before - after) > after // 2:
            break
    return size


def seconds_of(call: Callable[[], object]) -> float:
    """What a call takes, undisturbed, once what it needs has been allocated."""
    call()
    times = []
    for _ in range(_TRIES):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def free_memory() -> int | None:
    """Bytes that programs could have without anything being swapped out; None: not known."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass  # no Linux: the next best
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
