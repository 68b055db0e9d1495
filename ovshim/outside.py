"""What the code of a module's tree names outside of it: generators of random numbers, and what can
be written to, among globals, closures and the classes."""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from ovshim.captured_code import methods
from ovshim.classes import is_users
from ovshim.reached import iterates
from ovshim.stamps import stamp

__all__ = ["Written", "own_generators"]

_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
# Those of all the program: `random_generators` knows them by name.
_SHARED: tuple[Any, ...] = (
    torch.default_generator,
    random.random.__self__,  # type: ignore[attr-defined]  # typeshed has a function
    np.random.mtrand._rand,
)
_CONTAINERS = (dict, list, set, bytearray, deque)
# Of one container. A table of data is no place to look for generators in.
_MOST = 1000
# So far down containers in containers are looked into.
_DEEP = 3
_MOST_BYTES = 1 << 16


def own_generators(module: nn.Module) -> list[Any]:
    """Generators that the program keeps for itself, and whose states can be read."""
    return [
        value
        for value in _reached(module)[0]
        if _is_a(value, _GENERATORS)
        and not _is_a(value, random.SystemRandom)
        and all(value is not one for one in _SHARED)
    ]


class Written:
    """Whether what the code names has been written to since: containers and objects, names of
    globals, what is closed over, tensors and small arrays."""

    def __init__(self, module: nn.Module) -> None:
        objects, functions = _reached(module)
        self._held = [(value, _content(value)) for value in objects]
        named = [(one, name) for f in functions for one, name in _names(f)]
        self._names = [(space, name, space.get(name)) for space, name in named]
        self._cells = [(c, _inside(c)) for f in functions for c in f.__closure__ or ()]
        values = {id(v): v for *_, v in (*self._names, *self._cells)}.values()
        data = [v for v in values if _is_a(v, torch.Tensor) or _is_a(v, np.ndarray)]
        self._data = [(value, _state_of(value)) for value in data]

    def anything(self) -> bool:
        """Of what lies in them it is asked which it is, and not what has become of it."""
        for value, before in self._held:
            now = _content(value)
            if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
                return True
        return (
            any(space.get(name) is not value for space, name, value in self._names)
            or any(_inside(cell) is not value for cell, value in self._cells)
            or any(_state_of(value) != before for value, before in self._data)
        )


def _state_of(data: Any) -> Any:
    """What tells of a write to a tensor, or to an array, which counts none: of a small one all."""
    if _is_a(data, torch.Tensor):
        return stamp(data)
    small = data.nbytes <= _MOST_BYTES and not data.dtype.hasobject
    return np.ndarray.tobytes(data) if small else None


# Nothing here runs code of the program's classes, and what other threads may write to is copied in
# one go: what goes wrong here would go wrong in a call of the user's.


def _is_a(value: Any, kinds: Any) -> bool:
    """Not by what a proxy says of its `__class__`."""
    return issubclass(type(value), kinds)


def _content(value: Any) -> list[Any]:
    if _is_a(value, dict):
        return list(chain.from_iterable(list(dict.items(value))))
    iterate = iterates(value) if _is_a(value, _CONTAINERS) else None
    if iterate is not None:
        return list(iterate(value))
    return list(_attributes(value).values())


def _attributes(value: Any) -> dict[str, Any]:
    """Of a class, or of an object of a class of the user's that keeps some; empty for others."""
    if _is_a(value, type):
        return dict(type.__getattribute__(value, "__dict__"))
    if not _is_plain(value):
        return {}
    held = object.__getattribute__(value, "__dict__")
    return dict(held) if type(held) is dict else {}


def _is_plain(value: Any) -> bool:
    """Whether it is an object of a class of the user's that keeps attributes."""
    cls = type(value)
    if issubclass(cls, types.SimpleNamespace):
        return True
    unlike = (nn.Module, torch.Tensor, types.ModuleType, types.FunctionType, type)
    if issubclass(cls, unlike) or not is_users(cls) or not cls.__dictoffset__:
        return False
    defined = (base.__dict__.get("__dict__") for base in cls.__mro__)
    return all(one is None or _is_a(one, types.GetSetDescriptorType) for one in defined)


def _reached(module: nn.Module) -> tuple[list[Any], list[types.FunctionType]]:
    """What the code names, and what that holds, some levels down, each once; and the functions."""
    found: dict[int, Any] = {}
    modules = list(module.modules())
    classes = dict.fromkeys(base for m in modules for base in type(m).__mro__ if is_users(base))
    functions = [f for _, _, own in methods(map(type, modules), None) for f in own]
    held = (value for m in modules for value in list(m.__dict__.values()))
    functions += [value for value in held if _is_a(value, types.FunctionType)]
    for cls in classes:
        _add(found, [cls, *cls.__dict__.values()], functions)
    seen: dict[types.CodeType, types.FunctionType] = {}
    while functions:
        function = functions.pop()
        if function.__code__ not in seen and is_users(function):
            seen[function.__code__] = function
            _add(found, _named(function), functions)
    return list(found.values()), list(seen.values())


def _add(found: dict[int, Any], values: Iterable[Any], functions: list[types.FunctionType]) -> None:
    for value in values:
        value = value.__func__ if _is_a(value, (staticmethod, classmethod)) else value
        if _is_a(value, types.FunctionType):
            functions.append(value)
        elif _is_a(value, _GENERATORS):
            found[id(value)] = value
        elif _is_a(value, _CONTAINERS) or _is_plain(value):
            _add_held(found, value, _DEEP)
            own = _attributes(type(value)).values()
            functions += [v for v in own if _is_a(v, types.FunctionType)]
        elif _is_a(value, type) and is_users(value):
            found[id(value)] = value


def _add_held(found: dict[int, Any], value: Any, levels: int) -> None:
    """A container, or an object, with the containers and generators in it."""
    if id(value) in found:
        return
    found[id(value)] = value
    if not levels or _is_a(value, _GENERATORS):
        return
    content = _content(value)
    if len(content) <= _MOST:
        for inner in content:
            if _is_a(inner, (*_GENERATORS, *_CONTAINERS)):
                _add_held(found, inner, levels - 1)


def _names(function: types.FunctionType) -> Iterator[tuple[dict[str, Any], str]]:
    """The globals that a function names, and what it may ask of modules among them."""
    todo, names = [function.__code__], set[str]()
    while todo:
        code = todo.pop()
        names.update(code.co_names)
        todo += (const for const in code.co_consts if isinstance(const, types.CodeType))
    space = function.__globals__
    for name in names:
        if name in space:
            yield space, name
            value = space.get(name)
            if _is_a(value, types.ModuleType):  # of one of the program's: `settings.GENERATOR`
                inner = vars(value)
                yield from ((inner, one) for one in names if one in inner)


def _named(function: types.FunctionType) -> Iterator[Any]:
    """What a function names: globals, and what it closes over."""
    yield from (space.get(name) for space, name in _names(function))
    yield from map(_inside, function.__closure__ or ())
    yield from function.__defaults__ or ()


def _inside(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None
