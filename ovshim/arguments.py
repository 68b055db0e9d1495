"""Arguments of functions that are no options of a module: what each may be.

Each takes the value as it was given, and raises OptionError for one that cannot be right.
"""

import math
import numbers
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import OptionError


def check_min_speedup(value: Any) -> None:
    """Raise OptionError for what is no factor to be faster by."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        remedy = "Give the factor below which eager is to go on serving, such as 1.2."
        raise OptionError("min_speedup", value, "a finite number of 0 or more", remedy)


def check_timeout(value: Any) -> None:
    """Raise OptionError for what is no number of seconds; of none and fewer there may be, as for
    what is left of a time that is over."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if value is not None and (not number or math.isnan(value)):
        remedy = "Leave it out to wait however long it takes."
        raise OptionError("timeout", value, "a number of seconds or None", remedy)


def class_patterns(name: str, given: Any) -> tuple[str, ...]:
    """Names of classes or patterns of them, one or several."""
    several = isinstance(given, Iterable) and not isinstance(given, str)
    patterns: tuple[Any, ...] = tuple(given) if several else (given,)
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise OptionError(
            name, given, "names of classes or patterns of them", 'Give for example ["Bert*"].'
        )
    return patterns


def path_of(name: str, value: Any) -> Path:
    """An absolute path, of which a `~` at the beginning is the user's home."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not path:
        raise OptionError(name, value, "a path", "Give it as text or as a pathlib.Path.")
    return Path(path).expanduser().absolute()
