"""What an entry of the corpus is, and the registry that holds them by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn

__all__ = ["Call", "Edit", "Entry", "Path", "Redraw", "call", "entries", "register"]

Path = Literal["openvino", "eager", "either"]


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of one call. The checker hands out deep copies of them, never these."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def call(*args: Any, **kwargs: Any) -> Call:
    return Call(args, kwargs)


Redraw = Callable[[int, int, int], Call]
"""(seed, batch, length) → arguments drawn anew. The seed is set before it is called as well, so
that drawing from torch's own generator is enough."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """Something a user does to a module between two calls.

    `apply` gets the accelerated module and, apart from it, the plain one that it is compared with:
    whatever belongs to a module is to be done to each, whatever is global is done twice and must
    come to the same. The example is called afterwards, twice, and another draw.
    """

    name: str
    apply: Callable[[nn.Module], None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One module of the corpus, and how it is called.

    Attributes:
        name: unique, `family/name`.
        factory: makes the module in the mode in which it is to be called; the same weights each
            time (the seed is set before). It also puts back every global that an edit changes.
        redraw: draws arguments.
        path: where its example has to be served. "openvino" is met by "mixed" as well.
        tags: what it is about, for selections and for the table.
        size: (batch, length) of the example.
        batches, lengths: further sizes that are called; empty where that size is fixed.
        others: further calls, by name: another dtype, values that eager refuses, NaN.
        edits: done one after the other, at the end.
        seeds: how many further draws of the example's own size are called.
        tolerance: largest relative L2 error per floating output.
        options: of `ovshim.accelerate`, beside `prefer="openvino"`.
    """

    name: str
    factory: Callable[[], nn.Module]
    redraw: Redraw
    path: Path = "either"
    tags: frozenset[str] = frozenset()
    size: tuple[int, int] = (2, 5)
    batches: Sequence[int] = (1, 2, 3, 5)
    lengths: Sequence[int] = ()
    others: Mapping[str, Callable[[], Call]] = dataclasses.field(default_factory=dict)
    edits: Sequence[Edit] = ()
    seeds: int = 2
    tolerance: float = 1e-4
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def family(self) -> str:
        return self.name.partition("/")[0]

    def example(self) -> Call:
        return self.redraw(0, *self.size)


_ENTRIES: dict[str, Entry] = {}


def register(entry: Entry) -> Entry:
    """Add an entry. Raises ValueError for a name that is taken: one would hide the other."""
    if entry.name in _ENTRIES:
        raise ValueError(f"two entries are named {entry.name}")
    _ENTRIES[entry.name] = entry
    return entry


def entries() -> Mapping[str, Entry]:
    """Every entry by name, in the order of registration."""
    # Here and not above: these import this module.
    import conformance.awkward
    import conformance.real  # noqa: F401

    return _ENTRIES


def select(*patterns: str) -> Iterator[Entry]:
    """Entries whose name contains, or whose tags hold, one of the patterns; all without any."""
    for entry in entries().values():
        if not patterns or any(p in entry.name or p in entry.tags for p in patterns):
            yield entry
