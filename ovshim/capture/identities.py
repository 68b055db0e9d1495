"""Tensors of a call that are compared by `is` with tensors that are none of it.

To Dynamo two tensors are two for good. But the next call may bring that very one: a state that the
module began with, a tensor that stands for "nothing given".
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from ovshim.capture import CaptureError
from ovshim.capture.sources import Sources
from ovshim.capture.spared import put
from ovshim.reasons import reason

__all__ = ["noted", "refuse"]


@contextlib.contextmanager
def noted() -> Iterator[list[Any]]:
    """Gives the sources of the tensors that this thread's captures inside compare by `is`, two by
    two; None for what is computed."""
    from torch._dynamo.variables import builtin

    found: list[Any] = []
    # What compares is kept by Dynamo in tables; it looks up this function each time, for both.
    here, example_of = threading.get_ident(), vars(builtin)["extract_fake_example_value"]

    def noting(node: Any, *given: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == here:
            found.append(getattr(node.meta.get("grapharg"), "source", None))
        return example_of(node, *given, **kwargs)

    with put(builtin, "extract_fake_example_value", noting):
        yield found


def refuse(compared: Sequence[Any], sources: Sources) -> None:
    """Raises CaptureError where one of two is a tensor of the call, and the other one is not. Of
    two of the call the kind of it tells."""
    for pair in zip(compared[::2], compared[1::2], strict=False):
        if None not in pair and len({sources.is_given(source) for source in pair}) > 1:
            names = " is ".join(str(source.name) for source in pair)
            raise CaptureError(reason("value-dependent", f"the module asks {names}"))
