"""Marks: who is building what.

A conversion can kill its process. Whoever builds holds a locked file meanwhile; one that is there
and not locked was left by a process that died in its build.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from ovshim.cache import files
from ovshim.cache.upkeep import attempt, children

__all__ = ["left_behind", "marked"]

_log = logging.getLogger("ovshim")


@contextmanager
def marked(directory: Path, family: str, **options: Any) -> Iterator[None]:
    """Holds a mark for the block. Where it cannot be made there is none, and a log line."""
    # Locked under another name: a mark that is there and not locked yet would be taken for one that
    # was left. Windows renames no file that is open; it has no fork to make use of marks.
    path = directory / f"new-{family}.{uuid.uuid4().hex}"
    lock = None
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        lock = filelock.FileLock(path, **options)
        lock.acquire(timeout=0)
        path = path.rename(directory / path.name.removeprefix("new-"))
    except (OSError, NotImplementedError) as error:
        _log.debug("no mark at %s: %s", path, error)
    try:
        yield
    finally:
        if lock is not None:
            _remove(path, lock)


def left_behind(directory: Path, family: str) -> bool:
    """Whether a process has died in a build of this family. Its mark is taken away."""
    found = False
    for path in children(directory):
        if path.name.startswith(f"{family}."):
            # Claimed, not locked by `filelock`: that would make anew what its owner has taken away
            # since, and find it left. Of several that look, the one that removes it tells. (Windows
            # removes none that is open.)
            with files.claim(path) as free:
                found = (free and attempt("remove a mark", path.unlink)) or found
    return found


def _remove(path: Path, lock: filelock.BaseFileLock) -> None:
    # Before it is unlocked: nobody must find it free. On Windows a locked file cannot be removed.
    gone = attempt("remove a mark", lambda: path.unlink(missing_ok=True))
    attempt("unlock", lock.release)
    if not gone:
        attempt("remove a mark", lambda: path.unlink(missing_ok=True))
