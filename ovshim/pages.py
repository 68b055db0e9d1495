"""Memory that is given back to the system, where it can be told so."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["drop", "trim"]

_log = logging.getLogger("ovshim")


def drop(path: Path) -> int:
    """Let the pages of this file go that the process has read through a map of it; they are read
    from the file again when they are asked for. Only maps that nobody can write to, on Linux.

    Returns:
        Bytes of the maps that were dropped.
    """
    if sys.platform != "linux":
        return 0
    dropped = 0
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        for start, end in list(_read_only(os.path.realpath(path))):
            length = ctypes.c_size_t(end - start)
            if libc.madvise(ctypes.c_void_p(start), length, mmap.MADV_DONTNEED) == 0:
                dropped += end - start
    except (OSError, AttributeError, ValueError) as error:
        _log.debug("the map of %s stays in memory: %s", path, error)
    return dropped


def _read_only(path: str) -> Iterator[tuple[int, int]]:
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            # start-end permissions offset device inode path
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5] == path and fields[1][1] == "-":
                start, _, end = fields[0].partition("-")
                yield int(start, 16), int(end, 16)


def trim() -> None:
    """Let glibc hand back what was freed: it keeps pages between blocks that are in use."""
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError) as error:  # another C library
        _log.debug("no malloc_trim: %s", error)
