"""Dictionaries that nobody has written to need not be compared: how it is known where memory does
not tell (`untouched`), and the test that a count of writes has to pass in either.

CPython counts the writes to a dictionary, and torch hands the count out for its own guards: before
Python 3.12 it is read off the dictionary, later the dictionary is watched. Comparing the attributes
of a module touches some thirty lines of memory, which an inference has put out of the caches;
asking for the count touches two. Nobody promises it, so it is put to the test when this is
imported; where it fails, what would have been skipped is compared on every call.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ovshim.conditions import Conditions

__all__ = [
    "add_order",
    "add_unless_written",
    "ordered_keys",
    "tells_order",
    "tells_writes",
    "version_of",
]

Version = Callable[[dict[Any, Any]], int]


def _tried() -> Version | None:
    """What gives a number that grows with each write to a dictionary."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None  # after 3.12 torch keeps the counts without a lock
    try:
        guards: Any = torch._C._dynamo.guards
        version: Version = guards.dict_version
        return version if tells_writes(version) else None
    except Exception:  # whatever an interpreter without counts, or another torch, does
        return None


class _Object:
    pass


def tells_writes(version: Version) -> bool:
    """Whether it grows with writes of every kind, and does not with a look."""
    something = _Object()
    held = something.__dict__
    something.a = 1  # type: ignore[attr-defined]
    writes: Sequence[Callable[[], Any]] = (
        lambda: setattr(something, "a", 2),
        lambda: object.__setattr__(something, "b", 3),
        lambda: held.__setitem__("c", 4),
        lambda: held.update(c=5),
        lambda: held.setdefault("d", 6),
        lambda: held.pop("d"),
        lambda: delattr(something, "b"),
        lambda: held.popitem(),
        lambda: held.__ior__({"e": 7}),
        lambda: held.clear(),
        *(lambda n=n: setattr(something, "a", n) for n in range(2, 40)),  # the interpreter adapts
    )
    for write in writes:
        before = version(held)
        _ = list(held.values()), getattr(something, "a", None), held == {}
        if version(held) != before:  # by a look
            return False
        write()
        if version(held) <= before:
            return False
    return True


version_of: Version | None = _tried()


def add_unless_written(
    conditions: Conditions, held: Sequence[dict[Any, Any]], further: Callable[[], bool]
) -> None:
    """Add a condition that depends on nothing but what is written in these dictionaries: asked
    when first met, and then only after a write."""
    if version_of is None:
        conditions.add("{0}()", further)
        return
    known = [0]

    def again() -> bool:
        # Before the look: a write meanwhile is a write after it.
        now = sum(map(version_of, held))
        if not further():
            return False
        known[0] = now
        return True

    # Each of them grows alone, so their sum stands only while each does.
    conditions.add("sum(map({0}, {1})) == {2}[0] or {3}()", version_of, held, known, again)


def tells_order(held: dict[Any, Any]) -> bool:
    """Whether a change of order is a write to the dictionary. An OrderedDict keeps its order beside
    the dictionary."""
    return not isinstance(held, OrderedDict)


def ordered_keys(held: dict[Any, Any]) -> list[Any]:
    """Its keys in their order, without any code of its class."""
    return list(_keys_of(held)(held))


def add_order(conditions: Conditions, held: dict[Any, Any], keys: Sequence[Any]) -> None:
    """Add that a dictionary's keys are these, in this order."""
    conditions.add("list({0}({1})) == {2}", _keys_of(held), held, keys)


def _keys_of(held: dict[Any, Any]) -> Callable[[Any], Iterable[Any]]:
    return dict.keys if tells_order(held) else OrderedDict.keys
