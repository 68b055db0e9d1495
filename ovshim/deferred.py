"""Notes for the cache, written by another thread: no call should wait for a disk."""

from __future__ import annotations

import concurrent.futures
import logging
import os
from collections.abc import Callable
from typing import Any

__all__ = ["later"]

log = logging.getLogger("ovshim")

_writer: concurrent.futures.ThreadPoolExecutor | None = None


def later(write: Callable[[], Any]) -> None:
    """Run `write` in another thread, soon."""
    global _writer
    try:
        if _writer is None:
            _writer = concurrent.futures.ThreadPoolExecutor(1, "ovshim-writer")
        _writer.submit(_logged, write)
    except RuntimeError as error:  # the interpreter is ending
        log.debug("not written: %s", error)


def _logged(write: Callable[[], Any]) -> None:
    try:
        write()
    except Exception:  # nobody waits for it: a cache that fails costs time only
        log.debug("a note in the cache was not written", exc_info=True)


def _forget_writer() -> None:
    global _writer
    _writer = None  # its thread is not in this child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_writer)
