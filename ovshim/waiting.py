"""Threads that spin: a program in which eager and OpenVINO take turns pays for eager's waiting."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Collection

import torch

from ovshim.errors import OvshimWarning

__all__ = ["SHARED_OUT", "look_at"]

SHARED_OUT = 32768
"""From so many elements on torch shares out work among its threads. They spin for milliseconds
afterwards, on the cores that OpenVINO's are pinned to, so whatever is done to the tensors of a call
beside what OpenVINO does is done without them."""

_lock = threading.Lock()
_said = False


def look_at(paths: Collection[str]) -> None:
    """Warn, once in a process, where calls of these paths in turn would be faster if eager's idle
    threads slept. OpenMP reads that from the environment when torch is imported: nothing that is
    done here could change it."""
    global _said
    turns = "mixed" in paths or {"openvino", "eager"} <= set(paths)
    if _said or not turns or not _spins():
        return
    with _lock:
        if _said:
            return
        _said = True
    warnings.warn(
        "eager and OpenVINO take turns in this process, and eager's threads go on spinning while "
        "OpenVINO works. Set OMP_WAIT_POLICY=passive in the environment before the program "
        "starts.",
        OvshimWarning,
        stacklevel=2,
    )


def _spins() -> bool:
    told = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys()
    has_openmp: bool = torch._C.has_openmp
    return not told and torch.get_num_threads() > 1 and has_openmp
