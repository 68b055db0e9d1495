"""The thread that makes things while the program goes on.

One makes them all, one after the other: side by side they would only slow each other and the calls
that are served meanwhile. It is there as long as there is something to make; forks wait for it
between two stages, and it ends with the program.
"""

from __future__ import annotations

import collections
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from ovshim.job import BuildStopped
from ovshim.reasons import reason

__all__ = ["Work", "pause", "wait_for"]

log = logging.getLogger("ovshim")

# A fork waits so long for a stage of a build to end. Longer ones are rather interrupted in the
# child, where whatever lock they hold is never given back, than the program is kept waiting.
_FORK_SECONDS = 30.0
_PAUSE_SECONDS = 0.001


class Work:
    """Something that is to be made by that thread.

    Args:
        make: makes it. Nobody is told of what it raises.

    Attributes:
        done: set when that has come to an end.
    """

    def __init__(self, make: Callable[[], Any] | None = None) -> None:
        self._make = make
        self._builder = _builder
        self.done = threading.Event()

    @property
    def under_way(self) -> bool:
        """Whether it is still to be made. A fork has its parent's work, and nobody who does it."""
        return self._builder is _builder and not self.done.is_set()

    def start(self) -> None:
        """Let the thread do it. Whoever starts it has to keep it."""
        _builder.add(self)

    def run(self) -> None:
        """Do it, in that thread. Nothing is raised."""
        try:
            self.make()
        except BaseException:  # users' code runs in there, and nobody is here to be told
            log.debug("a build was given up", exc_info=True)
            self.failed()
        finally:
            self.end()

    def make(self) -> None:
        """What is to be done."""
        if self._make is not None:
            self._make()

    def failed(self) -> None:
        """It has raised."""

    def end(self) -> None:
        """Nothing more will come of it."""
        self.done.set()


def pause() -> None:
    """What `Job.pause` is for what that thread makes."""
    _builder.pause()


def wait_for(waits: Iterable[Callable[[float | None], bool]], timeout: float | None) -> bool:
    """Wait for several things in turn; whether all of them came about within `timeout` seconds.

    Args:
        waits: each waits for so many seconds at the most, and says the same of itself.
    """
    ends = None if timeout is None else time.monotonic() + timeout
    return all(wait(None if ends is None else max(0.0, ends - time.monotonic())) for wait in waits)


class _Builder:
    """The thread that makes plans, and what forks and the program's end have to know of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Weakly: a module that is gone needs no plan.
        self._queue: collections.deque[weakref.ref[Work]] = collections.deque()
        self._thread: threading.Thread | None = None
        # Held while a stage of a build runs, and while a fork is made.
        self._stage = threading.Lock()
        # Threads that fork, and whether each has got that lock.
        self._forks: dict[int, bool] = {}

    def add(self, build: Work) -> None:
        """Make it after those that were added before."""
        with self._lock:
            self._queue.append(weakref.ref(build))
            if self._thread is not None:
                return
            # No daemon (as what starts it may be): one that is inside OpenVINO when the interpreter
            # goes ends the process.
            self._thread = threading.Thread(target=self._work, name="ovshim-build", daemon=False)
            try:
                self._thread.start()
            except RuntimeError as error:  # the program ends, or has all the threads it may have
                log.debug("no thread for builds: %s", error)
                self._thread = None
                self._queue.clear()
                build.end()

    def pause(self) -> None:
        """Between two stages: let forks pass, and end with the program.

        Raises BuildStopped in the latter case.
        """
        if _is_ending():
            raise BuildStopped(reason("building", "the program ends"))
        if self is not _builder or threading.current_thread() is not self._thread:
            return  # in a child that a build has forked, or for one that another thread makes
        if self._forks:
            self._stage.release()
            while self._forks:
                time.sleep(_PAUSE_SECONDS)
            self._stage.acquire()

    def _work(self) -> None:
        while True:
            with self._lock:
                build = self._next()
                if build is None:
                    self._thread = None
                    return
            with self._stage:
                build.run()
            del build

    def _next(self) -> Work | None:
        while self._queue:
            build = self._queue.popleft()()
            if build is not None and _is_ending():
                build.end()
            elif build is not None and not build.done.is_set():
                return build
        return None

    def before_fork(self) -> None:
        """Wait until no stage is under way: its locks would stay locked in the child."""
        here = threading.get_ident()
        if threading.current_thread() is self._thread:
            return  # what the user's module does in there is its own business
        self._forks[here] = False
        self._forks[here] = self._stage.acquire(timeout=_FORK_SECONDS)
        if not self._forks[here]:
            log.warning("forked in the middle of a build: the child may hang in one of its own")

    def after_fork(self) -> None:
        """Go on, in the parent."""
        here = threading.get_ident()
        if self._forks.get(here):
            self._stage.release()
        self._forks.pop(here, None)


def _is_ending() -> bool:
    # The interpreter waits for threads before it runs what `atexit` has; but the main one is over.
    return not threading.main_thread().is_alive()


_builder = _Builder()


def _after_fork_in_child() -> None:
    global _builder
    _builder = _Builder()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _builder.before_fork(),
        after_in_parent=lambda: _builder.after_fork(),
        after_in_child=_after_fork_in_child,
    )
