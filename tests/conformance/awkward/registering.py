"""How a module of one class becomes an entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from conformance.drawing import draw, normal
from conformance.entries import Entry, Redraw, register

__all__ = ["VECTORS", "awkward", "ready", "sequences"]

VECTORS = draw(normal("B", 8))
SEQUENCES = draw(normal("B", "L", 8))
# The example's length is 5: one beside it, a shorter and a longer one, and the shortest.
LENGTHS = (4, 7, 9, 1)

Made = Callable[[], nn.Module]


def ready(make: Made, before: Callable[[], None] | None = None, *, train: bool = False) -> Made:
    """A factory that sets globals right first, and the module to evaluation last."""

    def factory() -> nn.Module:
        if before is not None:
            before()
        module = make()
        return module if train else module.eval()

    return factory


def awkward(
    name: str,
    redraw: Redraw = VECTORS,
    *tags: str,
    before: Callable[[], None] | None = None,
    train: bool = False,
    **fields: Any,
) -> Callable[[Made], Any]:
    """Registers what makes the module, a class without arguments or a function, as `name`."""

    def add(make: Made) -> Any:
        family, _, _ = name.partition("/")
        factory = ready(make, before, train=train)
        register(Entry(name, factory, redraw, tags=frozenset({"awkward", family, *tags}), **fields))
        return make

    return add


def sequences(name: str, *tags: str, redraw: Redraw = SEQUENCES, **fields: Any) -> Any:
    """`awkward` for a module of [batch, length, 8], or whatever else has lengths."""
    fields.setdefault("lengths", LENGTHS)
    return awkward(name, redraw, *tags, **fields)
