"""What a call hands out that no graph computes: constants, by way of where they were found.

Dynamo guards what its trace depends on. A constant that only goes out it reads anew at each call,
in the bytecode around the graph, and guards nothing. Here nobody runs that bytecode, so such
constants get guards of ours (`Sources.read_handed_out`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from ovshim.capture.spared import put

__all__ = ["noted"]


@contextlib.contextmanager
def noted() -> Iterator[list[Any]]:
    """Gives the sources of all that this thread's captures inside have bytecode written for."""
    from torch._dynamo.codegen import PyCodegen

    found: list[Any] = []
    here, write = threading.get_ident(), PyCodegen.__call__

    def writing(codegen: Any, value: Any, *given: Any, **kwargs: Any) -> None:
        source = getattr(value, "source", None)
        if source is not None and threading.get_ident() == here:
            found.append(source)
        write(codegen, value, *given, **kwargs)

    with put(PyCodegen, "__call__", writing):
        yield found
