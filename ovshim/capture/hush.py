"""Warnings of one thread, kept back and collected, while those of all others go on as ever.

`warnings.catch_warnings` swaps the filters of the whole process: what other threads warn of
meanwhile would be lost, and where they use it at the same time, filters stay behind that nobody
set. A filter may ask anything that has a `match`: one at the top of the list asks for the thread.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

__all__ = ["hushed"]


class _Nobody(Warning):
    """No warning is of this class: adding a filter for it only makes all be read anew."""


class _Here:
    """Stands where a filter has its pattern for the text; matches what one thread warns of."""

    def __init__(self) -> None:
        self.thread: int | None = threading.get_ident()
        self.texts: list[str] = []

    def match(self, text: str) -> bool:
        if threading.get_ident() != self.thread:
            return False
        self.texts.append(text)
        return True


@contextlib.contextmanager
def hushed() -> Iterator[list[str]]:
    """Keep back what this thread warns of; gives the texts, to which each warning is added.

    Not all of it where another thread leaves a `catch_warnings` of its own meanwhile.
    """
    here = _Here()
    entry = ("ignore", here, Warning, None, 0)
    warnings.filters.insert(0, entry)  # type: ignore[attr-defined]
    # Else what was warned of before at the same line would not be asked about again.
    warnings.simplefilter("ignore", _Nobody, append=True)
    try:
        yield here.texts
    finally:
        here.thread = None  # another thread may have taken the list away, and bring it back
        with contextlib.suppress(ValueError):
            warnings.filters.remove(entry)  # type: ignore[attr-defined]
