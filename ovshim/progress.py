"""Progress bars: on a terminal, or where they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from ovshim.options import Options

__all__ = ["bar"]

T = TypeVar("T")


def bar(items: Iterable[T], title: str, options: Options) -> Iterable[T]:
    """The items, with a bar on stderr unless `progress=False` or, without `progress=`, stderr is no
    terminal."""
    # tqdm's own None: no bar where there is no terminal.
    hidden = None if options.progress is None else not options.progress
    shown: Iterable[T] = tqdm(items, desc=f"ovshim: {title}", disable=hidden, leave=False)
    return shown
