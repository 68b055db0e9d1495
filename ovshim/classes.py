"""Classes of the user's own, as a graph has found them.

A method, a property or an attribute of a class may be replaced, and a new one added; a captured
graph has the old one in it. Classes of libraries are covered by their versions.
"""

from __future__ import annotations

import copyreg
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ovshim.containers import is_of_caches

__all__ = ["classes_of", "is_users", "snapshot"]

_LIBRARIES = frozenset({"torch", "numpy", "transformers", "ovshim", "openvino"})


def classes_of(modules: Iterable[nn.Module], objects: Iterable[Any]) -> list[type]:
    """The user's classes, and those of caches, among those of the modules, of what their attributes
    hold, and `objects` (classes themselves, or objects of them), each once, with those above."""
    held = [value for module in modules for value in module.__dict__.values()]
    things = (*modules, *held, *objects)
    each = dict.fromkeys(x if isinstance(x, type) else type(x) for x in things)
    above = (base for cls in each for base in cls.__mro__)
    return list(dict.fromkeys(b for b in above if is_users(b) or is_of_caches(b)))


def snapshot(classes: Iterable[type]) -> list[tuple[Mapping[str, Any], dict[str, Any]]]:
    """What each of them holds, to be compared with `==`, and a copy of it as it is now."""
    pairs: list[tuple[Mapping[str, Any], dict[str, Any]]] = []
    for cls in classes:
        # Python keeps these two in the class when they are first asked for: not a change.
        copyreg._slotnames(cls)  # type: ignore[attr-defined]
        getattr(cls, "__annotations__", None)
        pairs.append((cls.__dict__, dict(cls.__dict__)))
    return pairs


def is_users(what: type | types.FunctionType) -> bool:
    """Whether a class or a function is no library's. (Wrappers have the module of the wrapped.)"""
    where = what.__module__ if isinstance(what, type) else what.__globals__.get("__name__")
    top = str(where).partition(".")[0]
    return top not in _LIBRARIES and top not in sys.stdlib_module_names
