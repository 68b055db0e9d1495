"""What a call does besides that shows in nothing but its calls of C functions: it draws numbers of
Python's, seeds torch's generator as it is seeded, sets what is set so already, writes to a file."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import socket
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

from ovshim.settings import SETTERS, setting

__all__ = ["Seen", "watched"]

# The generator behind the functions of `random`.
_SHARED: Any = random.random.__self__  # type: ignore[attr-defined]  # typeshed has a function
_SEEDS = frozenset({"manual_seed", "seed", "set_state"})
# Of files and sockets, and of the modules behind `os`, `io` and `print`.
_SAYS = frozenset(
    {
        *("write", "writelines", "writev", "truncate", "send", "sendall", "sendto", "sendmsg"),
        *("print", "open", "mkdir", "rename", "replace", "remove", "unlink", "rmdir", "system"),
    }
)


@dataclasses.dataclass
class Seen:
    """What this thread was seen to do.

    Attributes:
        generators: from which it draws, or which it seeds: "python", "torch".
        settings: what it sets (`settings.SETTERS`), and whether that was ever set otherwise.
        speaks: whether it opens, changes or writes to files, or sends.
    """

    generators: set[str] = dataclasses.field(default_factory=set)
    settings: dict[str, bool] = dataclasses.field(default_factory=dict)
    speaks: bool = False

    def set_again(self) -> list[str]:
        """Settings that were set to what they were, each time: no block that sets them back."""
        return [name for name, otherwise in self.settings.items() if not otherwise]


@contextlib.contextmanager
def watched() -> Iterator[Seen]:
    """Gives what is seen of this thread while it is entered; nothing under a profiler."""
    seen = Seen()
    before: dict[str, Any] = {}

    def watch(frame: Any, event: str, called: Any) -> None:
        if event == "c_call":
            owner, name = getattr(called, "__self__", None), called.__name__
            if owner is _SHARED:
                seen.generators.add("python")
            elif owner is torch.default_generator and name in _SEEDS:
                seen.generators.add("torch")
            elif name in SETTERS and not _is_dynamos(frame):
                before[name] = setting(SETTERS[name])
            elif name in _SAYS and isinstance(owner, (io.IOBase, socket.socket, types.ModuleType)):
                seen.speaks = True
        elif event == "c_return" and called.__name__ in before:
            known = SETTERS[called.__name__]
            otherwise = before.pop(called.__name__) != setting(known)
            seen.settings[known] = seen.settings.get(known, False) or otherwise

    if sys.getprofile() is not None:  # a profiler's, which need not be one that Python can set
        yield seen
        return
    sys.setprofile(watch)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def _is_dynamos(frame: Any) -> bool:
    """Whether Dynamo sets it: to what it was, once it has compiled a part of the module's."""
    callers = [one for one in (frame, frame.f_back) if one is not None]
    names = [str(one.f_globals.get("__name__", "")) for one in callers]
    return any(name.startswith("torch._dynamo") for name in names)
