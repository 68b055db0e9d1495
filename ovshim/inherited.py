"""What a forked child has from its parent of OpenVINO: it may be read, and never be destroyed.

To destroy it hangs, at the interpreter's end at the latest. So each object gets a reference in the
child that nobody will ever give back.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any, TypeVar

__all__ = ["all_of", "keep_for_good"]

T = TypeVar("T")


def keep_for_good(*held: Any) -> None:
    """Let these objects live as long as the process, and longer than its interpreter."""
    for one in held:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


def all_of(known: weakref.WeakSet[T]) -> list[T]:
    """What is in the set, which other threads may be adding to."""
    while True:
        try:
            return list(known)
        except RuntimeError:  # it has grown under the eyes of its iterator
            continue
