"""Imports that no interrupt cuts short.

An import that a signal handler's exception ends half-way leaves modules behind that nobody in the
process can use or import anew: torch._dynamo, and with it torch.compile. Handlers run in the main
thread alone, so the import does not: the main thread waits, and is interrupted behind it.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable

from ovshim.signals import comes_here

__all__ = ["apart", "import_apart"]

# The last thread, and what tells that it has done its work. (To be interrupted in `join` would let
# Python take it for ended, and not wait for it at the program's end.)
_last: tuple[threading.Thread, threading.Event] | None = None


def import_apart(*names: str) -> None:
    """Have modules imported. What an import raises, the one that follows will raise again."""
    if all(_is_whole(name) for name in names):
        return

    def work() -> None:
        for name in names:
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    # What this thread itself is importing would never come to its end while it waits.
    if comes_here() and not _is_waited_for(names):
        apart(work)


def apart(work: Callable[[], None]) -> bool:
    """Do a work in another thread, and wait for it; what it raises is lost. Where this is not the
    main thread, or no thread can be started: False, and nothing done."""
    global _last
    if not comes_here():
        return False
    done = threading.Event()

    def run() -> None:
        try:
            with contextlib.suppress(Exception):
                work()
        finally:
            done.set()

    # No daemon: the end of the program waits for it.
    thread = threading.Thread(target=run, name="ovshim-import", daemon=False)
    _last = thread, done
    try:
        thread.start()
        done.wait()
    except BaseException as error:
        if thread.ident is None and isinstance(error, RuntimeError):
            return False  # the program ends, or has all the threads it may have
        # Not at once: who imports the same meanwhile, in the other order, meets half of it. (A
        # second interrupt is not kept waiting.)
        if thread.ident is not None:
            done.wait()
        raise
    return True


def _is_whole(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return name in sys.modules and not getattr(spec, "_initializing", False)


def _is_waited_for(names: tuple[str, ...]) -> bool:
    """Whether one of the packages is being imported, once the last thread has done its work."""
    if _last is not None and _last[0].is_alive():
        _last[1].wait()
    packages = {name.partition(".")[0] for name in names} | set(names)
    return any(name in sys.modules and not _is_whole(name) for name in packages)
