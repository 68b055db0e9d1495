"""A module's attributes: the tensors that it holds, and all as it was, to be compared with and put
back."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import nn

from ovshim.classes import is_users

__all__ = ["Attributes", "tensors_beside", "tensors_of"]

Named = tuple[str, torch.Tensor]

_MISSING: Any = object()
_OF_TORCH = frozenset(vars(nn.Module()))
_SIMPLE = frozenset({type(None), bool, int, float, str})
_MOST_VALUES = 20_000
_HOOKS = frozenset(key for key in vars(nn.Module()) if "hooks" in key)


class Attributes:
    """Each attribute of a module, with a one-level copy of what it holds where that is a list, a
    dict or a set. (`_parameters`, `_buffers`, `_modules` and the hooks are dicts like others.)

    A model has some thousands of them, and each look at it compares them: what can be, C code does.

    Attributes:
        name: of the module in its tree.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self._module = module
        self._before = dict(module.__dict__)
        self._held = [
            (key, value, value.copy())
            for key, value in self._before.items()
            if isinstance(value, (list, dict, set))
        ]

    def changed(self) -> str | None:
        """The name of an attribute that is not what it was."""
        before, now = self._before, self._module.__dict__
        if not all(map(is_, before.values(), map(now.get, before, repeat(_MISSING)))):
            moved = (key for key, value in before.items() if now.get(key, _MISSING) is not value)
            return next(moved, None)
        for key, value, items in self._held:
            if (items or value) and not _same_items(items, value):
                return key
        return next((key for key in list(now) if key not in before), None)

    def made(self) -> dict[str, Any]:
        """Those that are not what they were, by their path in the tree."""
        before = self._before
        return {
            f"{self.name}.{key}": value
            for key, value in self._module.__dict__.items()
            if before.get(key, _MISSING) is not value
        }

    def filled(self) -> bool:
        """Whether a list, a dict or a set does not hold what it did, hooks left out."""
        return any(
            key not in _HOOKS and not _same_items(items, value) for key, value, items in self._held
        )

    def put_back(self) -> None:
        """Let them be what they were."""
        if self.changed() is None:
            return
        now = self._module.__dict__
        for key in [key for key in now if key not in self._before]:
            del now[key]
        now.update(self._before)
        for _, value, items in self._held:
            if isinstance(value, list):
                value[:] = items
            else:
                value.clear()
                value.update(items)


def tensors_beside(modules: Sequence[tuple[str, nn.Module]]) -> list[torch.Tensor]:
    """Those that modules hold in other attributes: as such, in lists, tuples, sets and dicts, and
    in objects of the program's own; not all of them, where these hold very many values."""
    todo = [
        value
        for _, module in modules
        for key, value in list(module.__dict__.items())
        if key not in _OF_TORCH and type(value) not in _SIMPLE
    ]
    seen: dict[int, Any] = {}
    while todo and len(seen) < _MOST_VALUES:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        todo += _held_by(value)
    return [value for value in seen.values() if issubclass(type(value), torch.Tensor)]


def _held_by(value: Any) -> list[Any]:
    """What an object holds, by no code of its class."""
    kind = type(value)
    if issubclass(kind, torch.Tensor | nn.Module):
        return []
    for plain in (list, tuple, set):
        if issubclass(kind, plain):
            return list(plain.__iter__(value))
    if issubclass(kind, dict):
        return list(dict.values(value))
    held = None
    if is_users(kind):
        with contextlib.suppress(Exception):  # it has slots, or a `__dict__` of its own
            held = object.__getattribute__(value, "__dict__")
    return list(dict.values(held)) if isinstance(held, dict) else []


def tensors_of(
    root: nn.Module, modules: Sequence[tuple[str, nn.Module]] | None = None
) -> tuple[list[Named], list[Named]]:
    """The module's parameters, and its buffers, each once, with their names.

    By one walk over its modules, where `named_parameters` and `named_buffers` take one each, half a
    millisecond of some hundred modules. A class that has such a method of its own is asked by that
    too.

    Args:
        modules: what `root.named_modules()` gives, where it is at hand.
    """
    modules = list(root.named_modules()) if modules is None else modules
    return _held(root, modules, "parameters"), _held(root, modules, "buffers")


def _held(root: nn.Module, modules: Sequence[tuple[str, nn.Module]], kind: str) -> list[Named]:
    found: dict[int, Named] = {}
    for path, module in modules:
        for name, tensor in getattr(module, f"_{kind}").items():
            if tensor is not None and id(tensor) not in found:
                found[id(tensor)] = (f"{path}.{name}" if path else name, tensor)
    for method in (f"named_{kind}", kind):
        if getattr(type(root), method) is not getattr(nn.Module, method) or method in vars(root):
            for given in getattr(root, method)():
                name, tensor = given if method != kind else (kind, given)
                found.setdefault(id(tensor), (name, tensor))
    return list(found.values())


def _same_items(before: Any, after: Any) -> bool:
    if isinstance(before, set):
        return bool(before == after)
    after = after.copy()  # another thread may be at it
    if len(before) != len(after):
        return False
    if isinstance(before, dict):
        return all(k in after and after[k] is v for k, v in before.items())
    return all(map(is_, before, after))
