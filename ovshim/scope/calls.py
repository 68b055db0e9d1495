"""`nn.Module.__call__` while a scope is open, and which scope a call belongs to.

The one place where every module's call goes by is asked which call is the outermost: everything
else about a module stays untouched. With the last scope that ends, the very same function that was
there before is there again.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn

from ovshim import building
from ovshim.stays import Entry, current, here

__all__ = ["end", "enter", "forward_all", "inside", "is_torchs", "last_here", "unseen"]

_compiler = torch.compiler


class Finder(Protocol):
    """Serves outermost calls."""

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
        """What `module(*args, **kwargs)` answers."""


_everywhere: tuple[Entry, ...] = ()

inside: ContextVar[bool] = ContextVar("ovshim_inside", default=False)
"""Whether the code that runs was called by a module: what it calls is not outermost."""

_lock = threading.Lock()
_open = 0
_before: Any = nn.Module.__call__
_ours: Any = None


def _wrapped(before: Any) -> Any:
    """What stands in the place of `before` for one time that scopes are open."""

    def _call(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        # A constant to Dynamo, which then sees the original alone.
        if _compiler.is_dynamo_compiling() or inside.get() or _ours is not _call:
            return before(self, *args, **kwargs)
        finder = _current()
        if finder is None:
            return before(self, *args, **kwargs)
        return finder.call(self, args, kwargs)

    # Whoever reads code to know what a module computes need not read this.
    _call._ovshim_transparent = True  # type: ignore[attr-defined]
    _call._ovshim_before = before  # type: ignore[attr-defined]
    return _call


def _current() -> Finder | None:
    entry = current()
    if entry is None:
        entry = next((known for known in reversed(_everywhere) if known.live), None)
    finder: Finder | None = None if entry is None else entry.finder
    return finder


def forward_all(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call as it would be without us, and all calls within it."""
    token = inside.set(True)
    try:
        return _before(module, *args, **kwargs)
    finally:
        inside.reset(token)


def unseen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call as it would be without us; of calls within it one may be the outermost."""
    return _before(module, *args, **kwargs)


def last_here(entries: Sequence[Entry]) -> Entry | None:
    """The last of these stays that was begun in this context."""
    return next((entry for entry in reversed(here.get()) if entry in entries), None)


def is_torchs() -> bool:
    """Whether beneath us is torch's own function, and nobody else's."""
    return _before is nn.Module._wrapped_call_impl


def enter(entry: Entry, in_context: bool, everywhere: bool) -> None:
    """Begin a stay.

    Args:
        in_context: in this context (and in those copied from it).
        everywhere: in every thread of the process that is in no scope of its own.
    """
    global _open, _everywhere
    with _lock:
        if entry.finder is not None:
            if _open == 0:
                _install()
            _open += 1
        if entry.off:
            building.look_aside(1)
        if everywhere:
            _everywhere = (*(known for known in _everywhere if known.live), entry)
    if in_context:
        here.set((*(known for known in here.get() if known.live), entry))


def end(entry: Entry) -> None:
    """End a stay, in whichever thread or context. Does nothing the second time."""
    global _open, _everywhere
    with _lock:
        if not entry.live:
            return
        entry.live = False
        _everywhere = tuple(known for known in _everywhere if known.live)
        if entry.finder is not None:
            _open -= 1
            if _open == 0:
                _restore()
        if entry.off:
            building.look_aside(-1)
    here.set(tuple(known for known in here.get() if known.live))


def _install() -> None:
    global _before, _ours
    found: Any = nn.Module.__call__
    while hasattr(found, "_ovshim_before"):  # one of ours that somebody has put back, later
        found = found._ovshim_before
    _before, _ours = found, _wrapped(found)
    nn.Module.__call__ = _ours  # type: ignore[method-assign]
    _tell_dynamo(_before, _ours)


def _restore() -> None:
    global _ours
    if nn.Module.__call__ is _ours:
        nn.Module.__call__ = _before  # type: ignore[method-assign]
    # Else somebody has put theirs over ours, which does nothing any more but to call the original.
    _tell_dynamo(_ours, _before)
    _ours = None


def _tell_dynamo(old: Any, new: Any) -> None:
    """Dynamo remembers the method that it found when it was imported: where a module has another
    one it traces that, and guards all that it reads."""
    for name in ("torch._dynamo.utils", "torch._dynamo.variables.nn_module"):
        module = sys.modules.get(name)
        if getattr(module, "unpatched_nn_module_call", None) is old:
            module.unpatched_nn_module_call = new  # type: ignore[union-attr]


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # it may have been held by a thread that is not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
