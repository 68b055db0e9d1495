"""What a call leaves in the attributes of a twin, carried over to the module that it is a twin of.

A mixed plan runs in a tree of its own, and whoever looks at an attribute looks at the user's. A
module that writes to its attributes at every call is not divided; one that does for some calls only
(a BigBird that meets a short text) is not known for it before it is called so.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

from ovshim.conditions import Conditions
from ovshim.dict_versions import add_unless_written

__all__ = ["Carried"]

_MISSING: Any = object()


class Carried:
    """Attributes of a tree, as they are now, and of the module that they are to be carried to.

    Values go over as they are, but for submodules, which become the user's. What is written into a
    list, dict or tensor needs no carrying: both trees hold the same. Children are each one's own.

    Args:
        module: the user's.
        tree: its twin.
    """

    def __init__(self, module: nn.Module, tree: nn.Module) -> None:
        own, theirs = dict(module.named_modules()), dict(tree.named_modules())
        pairs = [(own[name], theirs[name]) for name in own.keys() & theirs.keys()]
        self._originals = {id(twin): original for original, twin in pairs}
        self._owns, self._theirs = (
            [
                held
                for inner in inners
                for held in (inner.__dict__, inner._modules)
                if isinstance(held, dict)  # not the children of a scripted module
            ]
            for inners in zip(*pairs, strict=True)
        )
        self._known: list[dict[str, Any]] = [held.copy() for held in self._theirs]
        self._lock = threading.Lock()
        conditions = Conditions()
        add_unless_written(conditions, self._theirs, self._is_as_it_was)
        self.unchanged = conditions.compiled()
        """Whether there is nothing to carry. Some hundredths of a microsecond a submodule."""

    def _is_as_it_was(self) -> bool:
        return all(map(_holds, self._theirs, self._known))

    def carry(self) -> None:
        """Let the module's attributes be what a call has made of the tree's."""
        with self._lock:
            for i, (own, theirs) in enumerate(zip(self._owns, self._theirs, strict=True)):
                known, now = self._known[i], theirs.copy()
                for key, value in now.items():
                    if known.get(key, _MISSING) is not value:
                        own[key] = self._originals.get(id(value), value)
                for key in known.keys() - now.keys():
                    own.pop(key, None)
                self._known[i] = now


def _holds(held: dict[str, Any], known: dict[str, Any]) -> bool:
    """Whether the same objects are in there; equal ones may be others."""
    return len(held) == len(known) and all(
        held.get(key, _MISSING) is value for key, value in known.items()
    )
