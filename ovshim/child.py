"""A work done in a child process first, because it may kill the process that does it."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch

__all__ = ["Outcome", "try_in_child"]

log = logging.getLogger("ovshim")

Outcome = Literal["finished", "crashed", "unknown"]

# By these a process dies of its own fault. What else ends it (a kill, no memory left) says nothing
# of the work.
_CRASHES = frozenset(
    getattr(signal, name)
    for name in ("SIGSEGV", "SIGFPE", "SIGILL", "SIGBUS", "SIGABRT")
    if hasattr(signal, name)
)
_POLL_SECONDS = 0.01
_ORPHAN_SECONDS = 0.2


def try_in_child(work: Callable[[], Any], seconds: float) -> Outcome:
    """How a child process fares with `work`, whose result and exceptions stay with it.

    A child by fork, for a spawned one would have to import the user's script again; "unknown" where
    there is no fork, and where the child is killed by others or is not done within `seconds`.
    """
    if not hasattr(os, "fork"):
        return "unknown"
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork beside threads: nothing that they hold is used in the child.
        warnings.simplefilter("ignore", DeprecationWarning)
        parent = os.getpid()
        pid = os.fork()
    if pid == 0:
        _work_and_exit(work, parent)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if os.WIFSIGNALED(status):
                log.info("a child process died of signal %d", os.WTERMSIG(status))
                return "crashed" if os.WTERMSIG(status) in _CRASHES else "unknown"
            return "finished"
        time.sleep(_POLL_SECONDS)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "unknown"


def _work_and_exit(work: Callable[[], Any], parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        # libgomp's other threads are not in the child, and a parallel region would wait for them.
        torch.set_num_threads(1)
        work()
    except BaseException:  # nothing may get back to the code that called the parent
        log.debug("the work of a child process failed", exc_info=True)
    finally:
        os._exit(0)


def _end_with(parent: int) -> None:
    """End this process when its parent has ended: nobody is left who would stop it in time."""
    while os.getppid() == parent:
        time.sleep(_ORPHAN_SECONDS)
    os._exit(1)
