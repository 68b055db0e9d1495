"""What the code of a module's tree names outside of it: generators of random numbers, and what can
be written to, among globals, closures and the classes."""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ovshim.captured_code import methods
from ovshim.classes import is_users

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


def own_generators(module: nn.Module) -> list[Any]:
    """Generators that the program keeps for itself, and whose states can be read."""
    return [
        value
        for value in _objects(module)
        if isinstance(value, _GENERATORS)
        and not isinstance(value, random.SystemRandom)
        and all(value is not one for one in _SHARED)
    ]


class Written:
    """Whether containers and objects that the code names have been written to since."""

    def __init__(self, module: nn.Module) -> None:
        self._held = [(value, list(_content(value))) for value in _objects(module)]

    def anything(self) -> bool:
        """Of what lies in them it is asked which it is, and not what has become of it."""
        for value, before in self._held:
            now = list(_content(value))
            if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
                return True
        return False


def _content(value: Any) -> Iterator[Any]:
    if isinstance(value, bytearray):
        yield from value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from pair
    elif isinstance(value, (list, set, deque)):
        yield from value
    elif isinstance(value, type):
        yield from value.__dict__.values()
    elif _is_plain(value):
        yield from vars(value).values()


def _is_plain(value: Any) -> bool:
    """Whether it is an object of a class of the user's that keeps attributes."""
    if isinstance(value, types.SimpleNamespace):
        return True
    unlike = (nn.Module, torch.Tensor, types.ModuleType, types.FunctionType, type)
    return not isinstance(value, unlike) and is_users(type(value)) and hasattr(value, "__dict__")


def _objects(module: nn.Module) -> list[Any]:
    """Each once: what the code names, and what that holds, one level down."""
    found: dict[int, Any] = {}
    modules = list(module.modules())
    classes = dict.fromkeys(base for m in modules for base in type(m).__mro__ if is_users(base))
    functions = [f for _, _, own in methods(map(type, modules), None) for f in own]
    functions += [v for m in modules for v in vars(m).values() if isinstance(v, types.FunctionType)]
    for cls in classes:
        _add(found, [cls, *cls.__dict__.values()], functions)
    seen: set[types.CodeType] = set()
    while functions:
        function = functions.pop()
        if function.__code__ not in seen and is_users(function):
            seen.add(function.__code__)
            _add(found, _named(function), functions)
    return list(found.values())


def _add(found: dict[int, Any], values: Iterable[Any], functions: list[types.FunctionType]) -> None:
    for value in values:
        value = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        if isinstance(value, types.FunctionType):
            functions.append(value)
        elif isinstance(value, _GENERATORS):
            found[id(value)] = value
        elif isinstance(value, _CONTAINERS) or _is_plain(value):
            found[id(value)] = value
            held = value if isinstance(value, _CONTAINERS) else vars(value)
            if len(held) <= _MOST:
                inner = (x for x in _content(value) if isinstance(x, (*_GENERATORS, *_CONTAINERS)))
                found.update((id(x), x) for x in inner)
            functions += [
                v for v in vars(type(value)).values() if isinstance(v, types.FunctionType)
            ]
        elif isinstance(value, type) and is_users(value):
            found[id(value)] = value


def _named(function: types.FunctionType) -> Iterator[Any]:
    """What a function names: globals, and what it closes over."""
    todo, names = [function.__code__], set[str]()
    while todo:
        code = todo.pop()
        names.update(code.co_names)
        todo += (const for const in code.co_consts if isinstance(const, types.CodeType))
    for name in names:
        if name in function.__globals__:
            value = function.__globals__[name]
            if isinstance(value, types.ModuleType):  # of one of the program's: `settings.GENERATOR`
                yield from (vars(value)[inner] for inner in names if inner in vars(value))
            else:
                yield value
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not bound yet
            continue
    yield from function.__defaults__ or ()
