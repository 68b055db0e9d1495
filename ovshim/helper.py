"""The compiled helper, `helper/hot.h`, where it was built: all that it does Python can do as well.

It is built when ovshim is installed, where there is a compiler for C (a wheel may bring it along).
OVSHIM_HELPER=0 leaves it out.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import Any

__all__ = ["hot"]

log = logging.getLogger("ovshim")

# What `helper/shortcut.c` says of itself.
_INTERFACE = 6


def _loaded() -> Any:
    # It counts on the interpreter's lock, which an import of it would bring back.
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    if sys.implementation.name != "cpython" or not gil or os.environ.get("OVSHIM_HELPER") == "0":
        return None
    try:
        found = importlib.import_module("ovshim._hot")
    except ImportError as error:
        log.debug("the hot path is Python's: %s", error)
        return None
    if found.INTERFACE != _INTERFACE:  # built of other sources, in a checkout
        log.debug("the hot path is Python's: the helper is to be built anew")
        return None
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=found.forget_held)
    return found


hot: Any = _loaded()
"""The module `ovshim._hot`; None where it is not there."""
