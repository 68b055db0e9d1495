"""How many threads an operation of eager's is shared out among, for one calling thread alone.

`torch.set_num_threads` is no help: a thread that torch meets for the first time begins with the
number that was set last, so one that comes meanwhile would stay with it for good. What it tells
OpenMP and MKL in turn, both keep for the calling thread, and here they are told directly.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

__all__ = ["can_be_one", "look_up", "one_thread"]

_Setter = Callable[[int], int | None]


class _Here(threading.local):
    """Of the calling thread: what takes all threads again if it is time; None: it has them."""

    look_up: Callable[[], None] | None = None


_here = _Here()


def can_be_one() -> bool:
    """Whether `one_thread` does what it says here."""
    return torch._C.has_mkl and torch._C.has_openmp and _setters() is not None


@contextlib.contextmanager
def one_thread(until: Callable[[], bool]) -> Iterator[None]:
    """Operations that this thread calls run in it alone; those of other threads as before.

    RuntimeError where `can_be_one` says no.

    Args:
        until: whether there is no reason for it any more. Asked where `look_up` is called.
    """
    setters = _setters()
    if setters is None:
        raise RuntimeError("This torch does not let the threads of one caller be counted.")
    openmp, mkl = setters
    before = torch.get_num_threads()  # also has torch count this thread's, if it never did
    local: int | None = 0  # what the whole process has

    def restore() -> None:
        _here.look_up = None
        try:
            if torch.get_num_threads() == 1:  # nobody has set it meanwhile
                openmp(before)
        finally:  # apart: an interrupt comes between two calls
            mkl(local or 0)

    def look() -> None:
        if until():
            restore()

    try:
        local = mkl(1)
        openmp(1)
        _here.look_up = look
        yield
    finally:
        restore()


def look_up() -> None:
    """Between two operations of this thread's: all threads again, if it is time."""
    if _here.look_up is not None:
        _here.look_up()


@functools.cache
def _setters() -> tuple[_Setter, _Setter] | None:
    """OpenMP's and MKL's own, as the torch that is loaded is linked to them."""
    for path in Path(torch.__file__).with_name("lib").glob("*torch_cpu.*"):
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(path))
            openmp, mkl = library.omp_set_num_threads, library.MKL_Set_Num_Threads_Local
            openmp.argtypes = mkl.argtypes = [ctypes.c_int]
            openmp.restype, mkl.restype = None, ctypes.c_int
            return openmp, mkl
    return None
