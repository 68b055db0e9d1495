"""Value guards laid out for a check of a few microseconds.

A path such as `module.config.layers[2].scale` is a chain of links, each an object and what is
found in it under one name. If every link still leads to the very same object, so does the path,
however the objects in between might be replaced. Links in plain dicts (attributes, globals, items)
are read by one `itemgetter` per dict; the few others one by one.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from ovshim.captured_code import is_torchs
from ovshim.conditions import Conditions
from ovshim.guards import Step, ValueGuard, measure, walk
from ovshim.reached import OF_MODULES

__all__ = ["GuardFailedError", "Watch", "replaceable"]

# What is equal to nothing but itself.
_EQUAL_IF_SAME = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
# Equal to nothing that a program could tell from them.
_NEVER_EQUAL = frozenset({type(None), str, bytes, type, types.FunctionType, types.ModuleType})


class GuardFailedError(Exception):
    """A guard that does not hold at the moment when its watch begins."""


class Watch:
    """Checks value guards, and names in dicts whose values must stay the same objects.

    Args:
        guards: what a captured graph takes for granted.
        roots: see `guards.roots_of`.
        names: further mappings, with the names in them to be watched.

    Attributes:
        tensors, functions, classes: those that the guards lead to.

    Raises (when made):
        GuardFailedError: a guard does not hold now.
    """

    def __init__(
        self,
        guards: Sequence[ValueGuard],
        roots: Mapping[str, Any],
        names: Iterable[tuple[Mapping[Any, Any], Sequence[Any]]] = (),
    ) -> None:
        self.tensors: list[torch.Tensor] = []
        self.functions: list[types.FunctionType] = []
        self.classes: list[type] = []
        self._instances: dict[int, tuple[dict[str, Any], int]] = {}
        self._groups: dict[int, tuple[Mapping[Any, Any], dict[Any, Any]]] = {}
        self._odd: list[tuple[Any, Step, Any, ValueGuard | None]] = []
        self._measured: list[tuple[Any, str, str | int | None]] = []
        for guard in guards:
            if not guard.holds(roots):
                raise GuardFailedError(str(guard))
            self._add(guard, roots)
        for held, keys in names:
            self._group(held).update((key, held[key]) for key in keys)

    @property
    def dicts(self) -> list[dict[Any, Any]]:
        """Those in which names are watched, and nothing else than a dict."""
        held = [held for held, _ in self._groups.values() if type(held) is dict]
        return [*held, *(attributes for attributes, _ in self._instances.values())]

    def conditions(
        self, conditions: Conditions, in_dicts: Conditions, dicts: Collection[int] = ()
    ) -> None:
        """Add every guard's check. It raises KeyError or BadGuardError where a name is gone.

        Args:
            in_dicts: takes the checks of what is written in these dictionaries, given by their ids.
        """
        for key, (held, known) in self._groups.items():
            if known:
                _reading(in_dicts if key in dicts else conditions, held, known)
        for base, step, found, guard in self._odd:
            if guard is None:
                conditions.add("{0}({1}, {2}) is {3}", _take, base, step, found)
            else:
                conditions.add("{0}({1}, {2}, {3}, {4})", _same, base, step, found, guard)
        for key, (attributes, count) in self._instances.items():
            where = in_dicts if key in dicts else conditions
            where.add("len({0}) == {1}", attributes, count)
        for found, test, expected in self._measured:
            conditions.add("{0}({1}, {2}) == {3}", measure, found, test, expected)

    def _add(self, guard: ValueGuard, roots: Mapping[str, Any]) -> None:
        found = walk(guard.root, guard.path, roots)
        self._add_classes(guard, roots)
        for base, step, at, last in _links(guard, roots):
            if isinstance(base, nn.Module) and _in_tree(base, step):
                continue  # the generation compares all of it
            held = _plain_dict(base, step)
            if held is not None:
                # What lies there: of a static method not what an attribute gives.
                self._group(held)[step[1]] = held[step[1]]
            elif type(base) is not tuple:
                value = guard if last and guard.test == "value" else None
                self._odd.append((base, step, at, value))
        if guard.test in ("length", "keys"):
            self._measured.append((found, guard.test, guard.expected))
        if isinstance(found, torch.Tensor):
            self.tensors.append(found)
        if isinstance(found, types.FunctionType):
            self.functions.append(found)

    def _add_classes(self, guard: ValueGuard, roots: Mapping[str, Any]) -> None:
        """Classes on the path, and the objects whose class it goes through: an attribute of their
        own would come before the class's."""
        at = walk(guard.root, (), roots)
        for step in guard.path:
            held = getattr(at, "__dict__", None)
            if step == ("attr", "__class__") and type(held) is dict:
                self._instances[id(held)] = held, len(held)
            at = _take(at, step)
            if isinstance(at, type):
                self.classes.append(at)

    def _group(self, held: Mapping[Any, Any]) -> dict[Any, Any]:
        return self._groups.setdefault(id(held), (held, {}))[1]


def _links(guard: ValueGuard, roots: Mapping[str, Any]) -> Iterator[tuple[Any, Step, Any, bool]]:
    """(object, step, what is there, whether it is the last step) along the guard's path. What leads
    into a class or to the cell of a function's closure is code, which the generation compares:
    watched is what the class or the cell holds."""
    start = 0
    for n, step in enumerate(guard.path):
        if step == ("attr", "__closure__"):
            start = n + 2
        elif step == ("attr", "__dict__"):
            start = n + 1
    base = walk(guard.root, guard.path[:start], roots)
    for n, step in enumerate(guard.path[start:], start):
        found = _take(base, step)
        yield base, step, found, n == len(guard.path) - 1
        base = found


def _take(base: Any, step: Step) -> Any:
    return walk("base", (step,), {"base": base})


def _in_tree(module: nn.Module, step: Step) -> bool:
    name = step[1]
    held = (module.__dict__, module._modules, module._parameters, module._buffers)
    return step[0] == "attr" and any(name in names for names in held)


def _plain_dict(base: Any, step: Step) -> Mapping[Any, Any] | None:
    """The dict in which this link is a plain key; None for lists, properties, slots, cells."""
    how, key = step
    held: Any = base if how == "item" else getattr(base, "__dict__", None)
    if type(held) not in (dict, types.MappingProxyType) or key not in held:
        return None
    if isinstance(base, threading.local):  # each thread has a dict of its own
        return None
    if how == "attr" and isinstance(getattr(type(base), str(key), None), property):
        return None
    found: Mapping[Any, Any] = held
    return found


def _same(base: Any, step: Step, found: Any, guard: ValueGuard) -> bool:
    now = _take(base, step)
    return now is found or measure(now, "value") == guard.expected


def _reading(conditions: Conditions, held: Mapping[Any, Any], known: Mapping[Any, Any]) -> None:
    keys = list(known)
    read = itemgetter(*keys, keys[0])  # the first one twice: always a tuple
    # The values are kept alive by their group: an id is not given to another object meanwhile.
    values = tuple(known[key] for key in (*keys, keys[0]))
    if all(type(value) in _EQUAL_IF_SAME for value in values):
        conditions.add("{0}({1}) == {2}", read, held, values)
    else:
        conditions.add("list(map(id, {0}({1}))) == {2}", read, held, list(map(id, values)))


def replaceable(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Attributes to be watched by identity, for to a comparison of dicts another one may be the
    same: 3, 3.0 and True, but `x * 3` and `x * 3.0` differ in dtype; a tensor of one element, or an
    object, that is equal now and is written to later. torch's own modules pass numbers to C++
    functions of fixed types, where they cannot differ."""
    for module in modules:
        held = module.__dict__
        kinds = torch.Tensor if is_torchs(type(module)) else object
        names = [
            name
            for name, value in held.items()
            if isinstance(value, kinds)
            and type(value) not in _NEVER_EQUAL
            and name not in OF_MODULES
            and not hasattr(type(value), "_ovshim_transparent")
        ]
        if names:
            yield held, names
