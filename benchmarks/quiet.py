"""Whether other programs use the processors: what they take is missing from what is measured.

Linux tells; elsewhere every moment counts as quiet, and the row of eager against itself has to do.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["BUSY_SHARE", "Delay", "share_of_others", "wait"]

# Others may take this share of all processors.
BUSY_SHARE = 0.1
_LOOK_SECONDS = 2.0


class Delay:
    """Adds up the seconds in which threads of this process could have run and had no processor."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._before: dict[str, int] = {}

    def start(self) -> None:
        self._before = _delays()

    def stop(self) -> None:
        before = self._before
        self.seconds += sum(n - before.get(thread, 0) for thread, n in _delays().items()) / 1e9


def _delays() -> dict[str, int]:
    """Nanoseconds that each thread of this process has waited for a processor."""
    found = {}
    for thread in Path("/proc/self/task").glob("*"):
        try:
            found[thread.name] = int((thread / "schedstat").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            continue  # the thread has ended, or this kernel does not count
    return found


def wait(patience: float) -> bool:
    """Wait until others leave the processors alone, for at most `patience` seconds.

    Returns:
        Whether they did.
    """
    deadline = time.monotonic() + patience
    while share_of_others() > BUSY_SHARE:
        if time.monotonic() >= deadline:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


def share_of_others() -> float:
    """The share of all processors that other programs take, watched for two seconds; 0.0 where that
    cannot be told."""
    before = _busy_seconds()
    own = time.process_time()
    time.sleep(_LOOK_SECONDS if before else 0.0)
    after = _busy_seconds()
    if before is None or after is None:
        return 0.0
    own = time.process_time() - own
    return (after - before - own) / (_LOOK_SECONDS * (os.cpu_count() or 1))


def _busy_seconds() -> float | None:
    """Seconds that all processors together have worked since the machine was started."""
    try:
        with open("/proc/stat", encoding="ascii") as lines:
            ticks = [int(n) for n in lines.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _waiting, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
