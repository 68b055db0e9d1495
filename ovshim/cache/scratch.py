"""Graphs that are in no entry: directories of this process alone, which go when it goes.

Python tidies up at the end of a program that ends by itself, not where a signal ends it (SIGTERM,
which stops a service, is one) and not in a forked child: there it would be the parent's directories
that went, and the child's own that stayed. So each is marked with a lease, which ends with its
process however that dies, and whoever makes one removes those that nobody holds.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing.util
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from ovshim.cache import files, upkeep
from ovshim.cache.entry import MARKER
from ovshim.cache.files import Lease

__all__ = ["scratch"]

_PREFIX = "ovshim-"

_log = logging.getLogger("ovshim")


def scratch(write: Callable[[Path], None]) -> tuple[Path, Callable[[], None]]:
    """A new directory of the files that `write` puts into it, where the system keeps temporary
    ones, and what removes it; without that it goes when the process ends.

    Raises `OSError` where there is none to be had, and what `write` raises.
    """
    _sweep()
    path = Path(tempfile.mkdtemp(prefix=_PREFIX))
    (path / MARKER).touch()
    lease = Lease.take(path / MARKER)
    if lease is None:  # taken for one that was left behind, in the moment before
        return scratch(write)
    # Unlike those of `tempfile` and `weakref` these run in children that multiprocessing forks, and
    # nothing that a child has inherited does.
    remove = multiprocessing.util.Finalize(None, _remove, (path, lease), exitpriority=0)
    try:
        write(path)
    except BaseException:
        remove()
        raise
    return path, remove


def _remove(path: Path, lease: Lease) -> None:
    lease.release()  # Windows removes no file that is open
    upkeep.erase(path)


@functools.cache
def _sweep() -> None:
    """Remove what processes of this user have left behind; once in a process."""
    for path in upkeep.children(Path(tempfile.gettempdir())):
        if path.name.startswith(_PREFIX):
            upkeep.attempt("sweep", functools.partial(_remove_if_nobodys, path))


def _remove_if_nobodys(path: Path) -> None:
    found = path.lstat(), (path / MARKER).lstat()
    strangers = hasattr(os, "geteuid") and {one.st_uid for one in found} != {os.geteuid()}
    if strangers or not stat.S_ISDIR(found[0].st_mode):
        return
    with files.claim(path / MARKER) as free:
        if free:
            # By a rename, which Windows refuses where a file in it is open: it knows no leases.
            target = Path(tempfile.mkdtemp(prefix=_PREFIX))
            try:
                path.rename(target / path.name)
            finally:
                upkeep.erase(target)
            _log.debug("%s was left behind", path)
