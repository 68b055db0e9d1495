"""Python's garbage collector: kept from looking at everything while a graph is captured, and made
to look where models come and go."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

__all__ = ["apart", "note", "whole"]

# Taken again by what a finalizer calls.
_lock = threading.RLock()
# Whether everything that there was is put aside.
_aside = False
# Python 3.12 puts some of its own objects aside before any program runs.
_PYTHONS = gc.get_freeze_count() if sys.version_info[:2] == (3, 12) else 0


# So many modules, and bytes of weights, may be in cycles that nobody has looked for.
_FEW = 16
_SMALL = 256 << 20


class _Accelerated:
    """The modules that were accelerated, and are not known to be gone."""

    def __init__(self) -> None:
        # As above: the collector may run while it is held.
        self._lock = threading.RLock()
        self._alive: list[tuple[weakref.ref[Any], int]] = []
        # What was alive behind the last look.
        self._modules = self._bytes = 0

    def note(self, module: Any, size: int) -> bool:
        """Note another one; whether there may be so many by now that are gone that it is time to
        look: as many as there were, so that looking costs a share of making them."""
        with self._lock:
            found = [(known, known[0]()) for known in self._alive]
            # Not itself: in place, a module may be accelerated again.
            self._alive = [known for known, one in found if one is not None and one is not module]
            modules, held = len(self._alive), sum(size for _, size in self._alive)
            self._alive.append((weakref.ref(module), size))
        many = modules - self._modules >= max(_FEW, self._modules)
        return many or held - self._bytes >= max(_SMALL, self._bytes)

    def settle(self) -> None:
        """A look is over: what is left is in use."""
        with self._lock:
            left = [size for known, size in self._alive if known() is not None]
            self._modules, self._bytes = len(left), sum(left)


_accelerated = _Accelerated()


def note(module: Any, size: int) -> None:
    """Note that a module is accelerated, before anything is built for it.

    It leads to itself by its `forward`: when the program drops it, it lives on with its weights,
    graphs and OpenVINO's threads until the collector looks at everything. By itself the collector
    seldom does in a program that makes few objects, and `apart` sets its counts back. So where as
    many were made as are in use, or with as many bytes, it is told to: what is gone is never more
    than that. (Weak references instead would end a `forward` that outlives its module.)

    Args:
        size: of its weights, in bytes.
    """
    if _accelerated.note(module, size) and gc.isenabled():
        with whole():
            gc.collect()
        _accelerated.settle()


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
    global _lock, _accelerated
    _lock, _accelerated = threading.RLock(), _Accelerated()
    _give_back()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
