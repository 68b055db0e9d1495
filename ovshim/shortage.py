"""Why OpenVINO has not compiled a graph: a fault of the graph's, which stays, or a want of memory,
threads or files, which passes."""

from __future__ import annotations

import re

from ovshim.reasons import Reason, reason

__all__ = ["SHORTAGE", "compile_failure"]

SHORTAGE = "out-of-resources"
"""The code where something was wanting: nothing is known of the graph then."""

# OpenVINO hands on what the system, the C++ library, oneDNN and TBB say, as RuntimeError. "Cannot
# allocate memory for type" and "failed to allocate registers" are of the graph.
_TEXTS = (
    r"bad[_ ]alloc",
    r"out of memory|not enough memory|could not create a memory object",
    r"(cannot|could not|failed to) allocate( \d+ bytes of)? memory(?! for\b)",
    r"resource temporarily unavailable|pthread_create has failed|not enough cpu resources",
    r"too many open files|no space left|disk quota exceeded|input/output error",
    r"can ?not open file|can not create file mapping",
)


def compile_failure(error: Exception) -> Reason:
    """The reason for an exception of OpenVINO's."""
    text = str(error).strip()
    detail = f"{type(error).__name__}: {(text.splitlines() or [''])[-1][:200]}"
    if re.search("|".join(_TEXTS), text, re.IGNORECASE):
        return reason("out-of-resources", detail)
    return reason("compile-failed", detail)
