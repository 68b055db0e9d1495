"""Value guards laid out for a check of a few microseconds.

A path such as `module.config.layers[2].scale` is a chain of links, each an object and what is
found in it under one name. If every link still leads to the very same object, so does the path,
however the objects in between might be replaced. Links in plain dicts (attributes, globals, items)
are read by one `itemgetter` per dict; the few others one by one.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import os
import threading
import types
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from ovshim.captured_code import is_torchs
from ovshim.classes import is_users
from ovshim.conditions import Conditions
from ovshim.dict_versions import add_order, ordered_keys, tells_order
from ovshim.guards import BadGuardError, Step, ValueGuard, measure, walk
from ovshim.reached import OF_MODULES

__all__ = ["GuardFailedError", "Watch", "modules_met", "replaceable"]

# What is equal to nothing but itself.
_EQUAL_IF_SAME = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
# Equal to nothing that a program could tell from them.
_NEVER_EQUAL = frozenset({type(None), str, bytes, type, types.FunctionType, types.ModuleType})


# As `guards.walk` takes these steps, in a tenth of the time.
_IN_PLACE = {"attr": "getattr({0}, {1}) is {2}", "item": "{0}[{1}] is {2}"}
# By which attributes are found without any code of a class.
_READING: tuple[Any, ...] = (object.__getattribute__, types.ModuleType.__getattribute__)


class GuardFailedError(Exception):
    """A guard that does not hold at the moment when its watch begins."""


class Watch:
    """Checks value guards, and names in dicts whose values must stay the same objects.

    Args:
        guards: what a captured graph takes for granted.
        roots: see `guards.roots_of`.
        names: further mappings, with the names in them to be watched.

    Attributes:
        tensors, functions: those that the guards lead to.
        classes: those that they lead to or through, and those of the objects on their way.
        reads_environment: whether any leads through `os.environ`; of a variable that was not there
            there is no guard.

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
        self.reads_environment = False
        self._instances: dict[int, tuple[dict[str, Any], int]] = {}
        self._groups: dict[int, tuple[Mapping[Any, Any], dict[Any, Any]]] = {}
        self._proxies: dict[type, Any] = {}
        self._odd: dict[Any, tuple[Any, Step, Any, ValueGuard | None]] = {}
        self._measured: list[tuple[Any, str, str | int | None]] = []
        self._kept: list[Any] = []  # so that the id of none is given to another
        self._keys: dict[int, tuple[dict[Any, Any], list[Any]]] = {}
        self._lacking: dict[int, tuple[dict[Any, Any], set[Any]]] = {}
        self._having: dict[int, tuple[dict[Any, Any], set[Any]]] = {}
        self._asked: dict[Any, tuple[Any, Step, bool]] = {}
        self._referred: list[weakref.ReferenceType[Any]] = []
        self._of_users: dict[int, Any] = {}
        for guard in guards:
            if not guard.holds(roots):
                raise GuardFailedError(str(guard))
            self._add(guard, roots)
        for held, keys in names:
            self._group(held).update((key, held[key]) for key in keys)

    @property
    def dicts(self) -> list[dict[Any, Any]]:
        """Those in which names are watched, and nothing else than a dict."""
        held = [held for held, _ in self._groups.values()]
        held += [held for held, _ in self._keys.values()]
        plain = [held for held in held if type(held) is dict]
        others = self._instances, self._lacking, self._having
        return [*plain, *(held for of in others for held, _ in of.values())]

    def conditions(
        self, conditions: Conditions, in_dicts: Conditions, dicts: Collection[int] = ()
    ) -> None:
        """Add every guard's check. Some raise where a name is gone, or whatever an object of the
        user's raises.

        Args:
            in_dicts: takes the checks of what is written in these dictionaries, given by their ids.
        """
        for key, (held, known) in self._groups.items():
            if known:
                _reading(in_dicts if key in dicts else conditions, held, known)
        for base, step, found, guard in self._odd.values():
            if guard is None and step[0] in _IN_PLACE:
                conditions.add(_IN_PLACE[step[0]], base, step[1], found)
            elif guard is None:
                conditions.add("{0}({1}, {2}) is {3}", _take, base, step, found)
            else:
                conditions.add("{0}({1}, {2}, {3}, {4})", _same, base, step, found, guard)
        for reference in self._referred:
            conditions.add("{0}() is not None", reference)
        if self._of_users:  # to `__class__` another class may be assigned
            objects = list(self._of_users.values())
            conditions.add("list(map(type, {0})) == {1}", objects, list(map(type, objects)))
        for base, step, there in self._asked.values():
            conditions.add("{0}({1}, {2}) is {3}", _leads, base, step, there)
        self._of_keys(conditions, in_dicts, dicts)
        for found, test, expected in self._measured:
            if isinstance(found, list | tuple):  # for a member is looked without a guard
                conditions.add("list(map(id, {0})) == {1}", found, list(map(id, found)))
            elif test == "length":
                conditions.add("len({0}) == {1}", found, expected)
            else:
                conditions.add("{0}({1}, {2}) == {3}", measure, found, test, expected)

    def _of_keys(
        self, conditions: Conditions, in_dicts: Conditions, dicts: Collection[int]
    ) -> None:
        of_each: tuple[tuple[str, dict[int, tuple[Any, Any]]], ...] = (
            ("len({0}) == {1}", self._instances),
            ("{0}.keys().isdisjoint({1})", self._lacking),
            ("{0}.keys() >= {1}", self._having),
        )
        for text, of in of_each:
            for key, (held, expected) in of.items():
                (in_dicts if key in dicts else conditions).add(text, held, expected)
        for key, (held, expected) in self._keys.items():
            where = in_dicts if key in dicts and tells_order(held) else conditions
            add_order(where, held, expected)

    def _add(self, guard: ValueGuard, roots: Mapping[str, Any]) -> None:
        if guard.test == "found":
            self._add_step(guard, roots)
            return
        found = walk(guard.root, guard.path, roots)
        self._add_classes(guard, roots)
        for base, step, at, last in _links(guard, roots, self._proxies):
            if isinstance(base, nn.Module) and _in_tree(base, step):
                continue  # the generation compares all of it
            if step[0] == "weak":
                self._referred.append(base)  # what it refers to is never another object
                continue
            held = _plain_dict(base, step)
            if held is not None:
                # What lies there: of a static method not what an attribute gives.
                self._group(held)[step[1]] = held[step[1]]
            elif type(base) is not tuple:
                value = guard if last and guard.test == "value" else None
                self._odd[id(base), step, value] = base, step, at, value
        if guard.test == "keys" and isinstance(found, dict):
            self._keys[id(found)] = found, ordered_keys(found)
        elif guard.test in ("length", "keys"):
            self._measured.append((found, guard.test, guard.expected))
            self._kept += found if isinstance(found, list | tuple) else ()
        if isinstance(found, torch.Tensor):
            self.tensors.append(found)
        if isinstance(found, types.FunctionType):
            self.functions.append(found)

    def _add_step(self, guard: ValueGuard, roots: Mapping[str, Any]) -> None:
        """Whether the last step leads anywhere; the others lead where they did."""
        step, there = guard.path[-1], bool(guard.expected)
        before = dataclasses.replace(guard, path=guard.path[:-1], test="same", expected=None)
        self._add(before, roots)
        base = walk(guard.root, before.path, roots)
        held = base if step[0] == "item" else getattr(base, "__dict__", None)
        if type(held) is not dict or (step[0] == "attr" and not _tells(base)):
            self._asked[id(base), step] = base, step, there
        elif step[0] != "attr" or (not there and _is_simple(base)):
            self._lacking.setdefault(id(held), (held, set()))[1].add(step[1])
        elif there and step[1] in held:
            self._having.setdefault(id(held), (held, set()))[1].add(step[1])
        else:
            self._asked[id(base), step] = base, step, there

    def _add_classes(self, guard: ValueGuard, roots: Mapping[str, Any]) -> None:
        """Classes on the path, and the objects whose class it goes through: an attribute of their
        own would come before the class's."""
        at = walk(guard.root, (), roots)
        for step in guard.path:
            held = getattr(at, "__dict__", None)
            in_class = step == ("attr", "__class__") and guard.test == "value"
            if in_class and type(held) is dict:
                self._instances[id(held)] = held, len(held)
            at = _take(at, step)
            if (
                is_users(type(at))
                and not isinstance(at, nn.Module)
                and ("weak", 0) not in guard.path
            ):
                self._of_users[id(at)] = at
            own = not guard.root.startswith("import:")  # a library reads variables of its own
            self.reads_environment |= own and at is os.environ
            self.classes += (at, type(at)) if isinstance(at, type) else (type(at),)

    def _group(self, held: Mapping[Any, Any]) -> dict[Any, Any]:
        return self._groups.setdefault(id(held), (held, {}))[1]


def _links(
    guard: ValueGuard, roots: Mapping[str, Any], proxies: dict[type, Any]
) -> Iterator[tuple[Any, Step, Any, bool]]:
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
    if isinstance(base, types.MappingProxyType):  # another one each time that it is asked for
        base = proxies.setdefault(walk(guard.root, guard.path[: start - 1], roots), base)
    for n, step in enumerate(guard.path[start:], start):
        found = _take(base, step)
        if step[0] == "own":
            base, step = vars(base), ("item", step[1])
        elif step[0] in ("key", "nth") and type(base) is dict:
            step = "item", _key(base, step)
        yield base, step, found, n == len(guard.path) - 1
        base = found


def _take(base: Any, step: Step) -> Any:
    return walk("base", (step,), {"base": base})


def _key(held: dict[Any, Any], step: Step) -> Any:
    how, key = step
    return ast.literal_eval(str(key)) if how == "key" else list(held)[int(key)]


def _leads(base: Any, step: Step) -> bool:
    try:
        _take(base, step)
    except BadGuardError:
        return False
    return True


def _tells(base: Any) -> bool:
    """Whether the names in the object's own dict decide which attributes there are: the classes of
    users are compared, and those of libraries are what they are."""
    if isinstance(base, type | threading.local) or hasattr(type(base), "__getattr__"):
        return False
    if isinstance(base, types.ModuleType) and "__getattr__" in vars(base):
        return False
    return _is_simple(base) or not is_users(type(base))


def _is_simple(base: Any) -> bool:
    return type(base).__getattribute__ in _READING


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


def modules_met(guards: Iterable[ValueGuard], roots: Mapping[str, Any]) -> Iterator[nn.Module]:
    """The modules that the guards lead to or through, and those inside of them."""
    met: dict[int, nn.Module] = {}
    for guard in guards:
        with contextlib.suppress(BadGuardError):
            at = walk(guard.root, (), roots)
            for step in guard.path:
                at = _take(at, step)
                if isinstance(at, nn.Module):
                    met[id(at)] = at
    for module in met.values():
        yield from module.modules()


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
