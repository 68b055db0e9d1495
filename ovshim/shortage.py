"""Why a build has failed: by a fault, of the graph's or ours, which stays, or for want of memory,
disk, threads or files, which passes."""

from __future__ import annotations

import errno
import re

from ovshim.reasons import Reason, reason

__all__ = ["SHORTAGE", "build_failure", "compile_failure"]

SHORTAGE = "out-of-resources"
"""The code where something was wanting: nothing is known of the graph then."""

_NUMBERS = frozenset(
    {
        errno.EAGAIN,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOSPC,
    }
)
# OpenVINO hands on what the system, the C++ library, oneDNN and TBB say, as RuntimeError. "Cannot
# allocate memory for type" and "failed to allocate registers" are of the graph; of a file that is
# cut short while it is written the C++ library says no more than "iostream error".
_TEXTS = (
    r"bad[_ ]alloc",
    r"out of memory|not enough memory|could not create a memory object",
    r"(cannot|could not|failed to) allocate( \d+ bytes of)? memory(?! for\b)",
    r"resource temporarily unavailable|pthread_create has failed|not enough cpu resources",
    r"too many open files|no space left|disk quota exceeded|input/output error",
    r"can ?not open file|can not create file mapping|iostream error",
)


def compile_failure(error: Exception) -> Reason:
    """The reason for an exception of OpenVINO's that ended a compilation."""
    # Before the last line are the places in OpenVINO's sources that it came by.
    said = (str(error).strip().splitlines() or [""])[-1][:200]
    detail = f"{type(error).__name__}: {said}"
    return reason("out-of-resources" if _passes(error) else "compile-failed", detail)


def build_failure(error: Exception) -> Reason:
    """The reason for an exception that a build did not expect."""
    detail = f"{type(error).__name__}: {error}"
    return reason("out-of-resources" if _passes(error) else "build-failed", detail)


def _passes(error: Exception) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _NUMBERS):
        return True
    return re.search("|".join(_TEXTS), str(error), re.IGNORECASE) is not None
