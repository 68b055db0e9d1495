"""A whole program, started by `ovshim run` or with OVSHIM=1."""

from __future__ import annotations

import json
import os
from typing import Any

from ovshim.scope import enable

__all__ = ["ARGUMENTS", "start"]

ARGUMENTS = "_OVSHIM_ARGUMENTS"
"""The variable by which `ovshim run` hands its arguments to child processes, as JSON."""

_started: int | None = None


def start() -> None:
    """`enable()` with the arguments of `ovshim run`, where it is above us; once in a process.

    Raises OptionError.
    """
    global _started
    if _started != os.getpid():
        _started = os.getpid()
        arguments: dict[str, Any] = json.loads(os.environ.get(ARGUMENTS, "{}"))
        enable(**arguments)
