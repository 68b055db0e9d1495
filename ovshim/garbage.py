"""Python's garbage collector, kept from looking at everything while a graph is captured."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
from collections.abc import Iterator

__all__ = ["apart", "whole"]

# Taken again by what a finalizer calls.
_lock = threading.RLock()
# Whether everything that there was is put aside.
_aside = False
# Python 3.12 puts some of its own objects aside before any program runs.
_PYTHONS = gc.get_freeze_count() if sys.version_info[:2] == (3, 12) else 0


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """The collector looks at nothing but what is made meanwhile, and at that once more at the end.

    What a capture allocates sets off a look at everything, which beside transformers takes a
    quarter of a second: twice in the capture and once behind it. And what it leaves are cycles,
    which hold weights. (`gc.disable`, and thresholds, would have to be undone though the program
    may have set its own meanwhile.)

    Not where the program has put objects aside itself: they would be given back to the collector.
    """
    global _aside
    with _lock:
        ours = gc.get_freeze_count() <= _PYTHONS
        if ours:
            gc.freeze()
            _aside = True
    try:
        yield
    finally:
        if ours and _aside and gc.isenabled():
            gc.collect()
        if ours:
            with _lock:
                _give_back()


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """The collector knows of all objects for the block, as `gc.get_referrers` must."""
    with _lock:
        _give_back()
        yield


def _give_back() -> None:
    global _aside
    if _aside:
        _aside = False
        gc.unfreeze()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()
    _give_back()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
