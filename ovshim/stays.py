"""The scopes that this context is in: blocks of `enabled` and `disabled` that are not left yet."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

__all__ = ["Entry", "current", "here", "switched_off"]


class Entry:
    """One stay in a scope.

    Args:
        finder: serves outermost calls; None: they are left alone.
        off: within it eager also answers for what was accelerated by name.
    """

    __slots__ = ("finder", "live", "off")

    def __init__(self, finder: Any, off: bool = False) -> None:
        self.finder = finder
        self.off = off
        self.live = True


# No tokens: generators and tasks may leave in another order than they entered in, and where they
# were not entered. An entry that has ended counts for nothing, wherever it still stands.
here: ContextVar[tuple[Entry, ...]] = ContextVar("ovshim_scopes", default=())


def current() -> Entry | None:
    """The innermost stay of this context."""
    for entry in reversed(here.get()):
        if entry.live:
            return entry
    return None


def switched_off() -> bool:
    """Whether eager is to answer everything here. Only asked where something is switched off
    somewhere in the process: see `building.running`."""
    entry = current()
    return entry is not None and entry.off
