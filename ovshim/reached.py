"""What code reads beyond a module's tree, found by following it.

A graph that Dynamo has captured says what it read. A bare trace does not: so all is taken for read
that the code could have met, objects in attributes and what they hold, globals, closures, classes.
What libraries define is covered by their versions; that one of their functions was replaced is
seen.
"""

from __future__ import annotations

import contextvars
import functools
import threading
import types
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ovshim.classes import is_users
from ovshim.conditions import Conditions
from ovshim.dict_versions import add_order, ordered_keys, tells_order
from ovshim.fingerprint.bytecode import facts
from ovshim.fingerprint.values import atom, functions, slots

__all__ = ["OF_MODULES", "Reached", "UnwatchableError", "iterates"]

OF_MODULES = frozenset(nn.Module().__dict__)
"""Attributes that every module has."""

# Objects; what holds more (a trainer, a data set) is no configuration.
_MOST = 5000
# Of an array, which has no count of writes and is compared on each call.
_MOST_BYTES = 1 << 16
_CODE = (types.FunctionType, types.MethodType, type, functools.partial, nn.Module)

_OF_LAYERS = ("torch.nn.modules.", "torch.nn.functional")

_values: Callable[[dict[Any, Any]], Iterable[Any]] = dict.values


class UnwatchableError(Exception):
    """More is within reach than could be watched, or something that cannot be."""


class Reached:
    """All that is within reach of these modules' attributes and of these functions.

    Attributes:
        tensors, functions, classes: those that were met, the modules' own left out.
        dicts: those whose contents are watched.

    Raises (when made):
        UnwatchableError.
    """

    def __init__(self, modules: Iterable[nn.Module], code: Iterable[types.FunctionType]) -> None:
        self.tensors: list[torch.Tensor] = []
        self.functions: list[types.FunctionType] = []
        self.classes: list[type] = []
        self.dicts: list[dict[Any, Any]] = []
        self._whole: list[dict[Any, Any]] = []
        self._named: list[tuple[dict[str, Any], list[str]]] = []
        self._lists: list[Any] = []
        self._cells: list[types.CellType] = []
        self._asked: list[tuple[Callable[[Any], Any], Any]] = []
        self._bytes: list[tuple[Any, bytes]] = []
        # Kept, so that the id of none is given to another.
        self._met: dict[Any, Any] = {}
        self._kept: list[Any] = []
        self._todo: list[Any] = []
        for module in modules:
            self._met[id(module)] = module
            self._look_into_slots(module)
            self._todo += (v for name, v in module.__dict__.items() if name not in OF_MODULES)
        self._todo += code
        while self._todo:
            self._meet(self._todo.pop())

    def conditions(self, conditions: Conditions, in_dicts: Conditions) -> None:
        """Add the checks that all is what it is now; `in_dicts` takes those of `dicts`."""
        of_dict = of_list = "list(map(id, {0}({1}))) == {2}"
        for held in self._whole:
            where = in_dicts if tells_order(held) else conditions
            add_order(where, held, ordered_keys(held))
            in_dicts.add(of_dict, _values, held, self._ids(_values(held)))
        for held, names in self._named:
            ids = self._ids(map(held.get, names))
            in_dicts.add("list(map(id, map({0}, {1}))) == {2}", held.get, names, ids)
        for values in self._lists:
            iterate = iterates(values)
            conditions.add(of_list, iterate, values, self._ids(iterate(values)))
        for cell in self._cells:
            conditions.add("{0}.cell_contents is {1}", cell, cell.cell_contents)
        for ask, of in self._asked:
            conditions.add("{0}({1}) is {2}", ask, of, ask(of))
        for held, then in self._bytes:
            # No view of it is kept: what is viewed cannot grow.
            conditions.add("bytes({0}) == {1}", held, then)
            if isinstance(held, np.ndarray):
                conditions.add("{0}.shape == {1}", held, held.shape)
                conditions.add("{0}.dtype == {1}", held, held.dtype)

    def _ids(self, values: Iterable[Any]) -> list[int]:
        kept = list(values)
        self._kept.append(kept)
        return list(map(id, kept))

    def _meet(self, value: Any) -> None:
        ours = hasattr(type(value), "_ovshim_transparent")
        is_array = isinstance(value, np.ndarray | array | bytearray)
        if ours or id(value) in self._met or (atom(value) is not None and not is_array):
            return
        self._met[id(value)] = value
        if _is_mock(value):
            raise UnwatchableError("a mock counts its calls")
        if len(self._met) > _MOST:
            raise UnwatchableError(f"more than {_MOST} objects are within reach of it")
        if is_array:
            self._array(value)
        elif isinstance(value, torch.Tensor):
            self.tensors.append(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.MethodType):
            self._todo += (value.__func__, value.__self__)
        elif isinstance(value, weakref.ReferenceType):
            self._todo.append(value())
        elif isinstance(value, contextvars.ContextVar):
            self._ask(contextvars.ContextVar.get, value)
        elif isinstance(value, threading.local):
            raise UnwatchableError("each thread may have something else in a threading.local")
        elif isinstance(value, functools.partial):
            self._todo += (value.func, value.args, value.keywords)
        elif members := functions(value):
            self._todo += members
        elif not isinstance(value, types.ModuleType | types.BuiltinFunctionType):
            self._object(value)

    def _object(self, value: Any) -> None:
        self._todo.append(type(value))
        if isinstance(value, dict):
            self._hold(value)
        elif iterate := iterates(value):
            if not isinstance(value, tuple | frozenset):
                self._lists.append(value)
            self._todo.extend(iterate(value))
        held = getattr(value, "__dict__", None)
        if type(held) is dict:
            self._hold(held)
        self._look_into_slots(value)

    def _look_into_slots(self, value: Any) -> None:
        for slot in slots(type(value)):
            self._ask(slot.__get__, value)

    def _ask(self, ask: Callable[[Any], Any], of: Any) -> None:
        try:
            self._todo.append(ask(of))
        except (AttributeError, LookupError):  # nothing is there
            return
        self._asked.append((ask, of))

    def _array(self, value: Any) -> None:
        with memoryview(value) as data:
            size, of_objects = data.nbytes, "O" in data.format
        if of_objects or size > _MOST_BYTES:
            raise UnwatchableError(f"an array of {size} bytes is within reach of it")
        self._bytes.append((value, bytes(value)))

    def _hold(self, held: dict[Any, Any]) -> None:
        self._met[id(held)] = held
        self.dicts.append(held)
        self._whole.append(held)
        self._todo += _values(held)

    def _class(self, cls: type) -> None:
        for base in cls.__mro__:
            if is_users(base):
                self.classes.append(base)
                self._todo += base.__dict__.values()

    def _function(self, function: types.FunctionType) -> None:
        users = is_users(function)
        for cell in function.__closure__ or ():
            try:
                found = cell.cell_contents
            except ValueError:  # empty
                continue
            if users:
                self._todo.append(found)
                self._cells.append(cell)
            elif isinstance(found, _CODE):  # that a library's wrapper is around
                self._todo.append(found)
        if not users:
            if function.__globals__.get("__name__", "").startswith(_OF_LAYERS):
                self._layers_own(function)
            return
        self.functions.append(function)
        self._todo += (function.__defaults__, function.__kwdefaults__, function.__dict__)
        found = facts(function.__code__)
        self._names(function.__globals__, list(found.globals), found.names)

    def _layers_own(self, function: types.FunctionType) -> None:
        """What torch's own layers call, which a patch may replace for a while."""
        found, space = facts(function.__code__), function.__globals__
        inner = [value for value in map(space.get, found.globals) if value in (torch, F)]
        for names, held in ((found.globals, space), *((found.names, vars(one)) for one in inner)):
            called = [name for name in names if callable(held.get(name))]
            self.dicts.append(held)
            self._named.append((held, called))
            values = (held[name] for name in called)
            self._todo += (v for v in values if type(v) is types.FunctionType or _is_mock(v))

    def _names(self, space: dict[str, Any], names: list[str], further: tuple[str, ...]) -> None:
        """Names that are asked of a function's globals or of a module, and `further` ones, of the
        modules among them."""
        self.dicts.append(space)
        self._named.append((space, names))
        for value in map(space.get, names):
            if not isinstance(value, types.ModuleType):
                self._todo.append(value)
            elif (id(value), further) not in self._met:
                self._met[id(value), further] = value
                inner = vars(value)
                self._names(inner, [name for name in further if name in inner], further)


def iterates(value: Any) -> Any:
    """What gives a collection's items, without any code of its class; None for what is none."""
    kinds = (list, deque, set, tuple, frozenset, bytearray)
    return next((kind.__iter__ for kind in kinds if issubclass(type(value), kind)), None)


def _is_mock(value: Any) -> bool:
    return any(cls.__module__ == "unittest.mock" for cls in type(value).__mro__)
