"""What keeps a store from growing: sizes, eviction, and what dead writers left behind.

Every function takes the directory `<root>/v1`. A step that fails is a debug line: the next
process tries again.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ovshim.cache import files
from ovshim.cache.entry import MARKER, is_key

DAY = 86400.0  # seconds

_log = logging.getLogger("ovshim")


def attempt(purpose: str, action: Callable[[], object]) -> bool:
    """Runs what may fail without harm; whether it did not."""
    try:
        action()
    except (OSError, ValueError) as error:
        _log.debug("%s: %s", purpose, error)
        return False
    return True


def children(directory: Path) -> list[Path]:
    """What lies in a directory, sorted; nothing where it cannot be read."""
    try:
        return sorted(directory.iterdir())
    except OSError as error:
        _log.debug("nothing in %s: %s", directory, error)
        return []


def temporary(room: Path) -> Path:
    """A new directory in v1/tmp: beside the entries, since a rename needs one file system."""
    return _fresh(room / "tmp")


def set_aside(room: Path, path: Path) -> Path:
    """Moves a path out of the way by one rename. Returns the directory that now holds it."""
    target = _fresh(room / "quarantine")
    try:
        os.rename(path, target / path.name)
    except OSError:
        target.rmdir()
        raise
    return target


def size(room: Path) -> int:
    """Bytes of all entries, and of what is in quarantine."""
    return sum(size for _, size, _ in _entries(room)) + spoilt(room)


def spoilt(room: Path) -> int:
    """Bytes of what is in quarantine."""
    return bytes_of(room / "quarantine")


def paths(room: Path) -> list[Path]:
    """Where all entries lie, by name."""
    families = [family for family in children(room) if is_key(family.name)]
    return [path for family in families for path in children(family)]


def sweep(room: Path) -> None:
    """Removes what has lain for a day in v1/tmp, v1/quarantine and v1/marks."""
    now = time.time()
    for name in ("tmp", "quarantine", "marks"):
        for path in children(room / name):
            # Distance, not age: after a clock went back all files lie in the future.
            if abs(now - modified(path)) > DAY:
                erase(path)


def evict(room: Path, limit: int, keep: Path | None = None) -> None:
    """Removes entries, least recently held first, until at most `limit` bytes are left.

    Quarantine goes before any entry. An entry that a process holds stays, and so does `keep`.
    """
    entries = sorted(_entries(room))
    damaged = spoilt(room)
    total = sum(size for _, size, _ in entries) + damaged
    if total > limit and damaged:
        for path in children(room / "quarantine"):
            erase(path)
        total -= damaged
    for _, freed, path in entries:
        if total <= limit:
            return
        if path != keep and _evicted(room, path):
            _log.debug("%s removed for space", path)
            total -= freed


def erase(path: Path) -> None:
    """Removes a file or a whole directory, or a part of it where the rest cannot be."""

    def erasing() -> None:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()

    attempt("erase", erasing)


def _evicted(room: Path, path: Path) -> bool:
    with files.claim(path / MARKER) as free:
        if not free:
            return False
        try:
            moved = set_aside(room, path)
        except OSError as error:
            _log.debug("%s stays: %s", path, error)
            return False
    erase(moved)
    attempt("remove an empty family", path.parent.rmdir)
    return True


def _entries(room: Path) -> Iterator[tuple[float, int, Path]]:
    """Of every entry: when it was last held, its bytes, its path."""
    for path in paths(room):
        yield modified(path / MARKER), bytes_of(path), path


def _fresh(parent: Path) -> Path:
    parent.mkdir(mode=0o700, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=parent))


def modified(path: Path) -> float:
    """When a file was last written to, in seconds since 1970; 0 where there is none."""
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return 0.0


def bytes_of(path: Path) -> int:
    """Bytes of all files below a directory."""
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(directory, name)).st_size
            except OSError as error:
                _log.debug("not counted: %s", error)  # gone since it was listed
    return total
