"""Values that are their own description, and how to take others apart."""

from __future__ import annotations

import collections
import copyreg
import enum
import functools
import logging
import struct
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.hooks import RemovableHandle

from ovshim.fingerprint.bytecode import digest


def text(value: str) -> bytes:
    """A string that ends where it says, so that neighbours cannot run into each other."""
    data = value.encode("utf-8", "surrogatepass")
    return b"s%d:%b" % (len(data), data)


_ATOMS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda v: b"None;",
    type(...): lambda v: b"...;",
    type(NotImplemented): lambda v: b"NotImplemented;",
    bool: lambda v: b"True;" if v else b"False;",
    int: lambda v: b"i%x;" % v,
    float: lambda v: b"f" + struct.pack("<d", v),
    complex: lambda v: b"c" + struct.pack("<2d", v.real, v.imag),
    str: text,
    bytes: lambda v: b"b%d:%b" % (len(v), v),
    bytearray: lambda v: b"B%d:%b" % (len(v), v),
    range: lambda v: text(repr(v)),
    torch.dtype: lambda v: text(str(v)),
    torch.device: lambda v: text(str(v)),
    torch.layout: lambda v: text(str(v)),
    torch.memory_format: lambda v: text(str(v)),
}

# Objects whose state is no part of an answer. RemovableHandle counts up over the process.
_STATELESS = (logging.Logger, logging.Handler, type(threading.Lock()), type(threading.RLock()),
              threading.Condition, threading.Event, RemovableHandle)  # fmt: skip

_CONTAINERS = (list, tuple, set, frozenset, dict, collections.OrderedDict)


def atom(value: object) -> bytes | None:
    """What stands for a value that holds no others; None for one that does, or is unknown."""
    encode = _ATOMS.get(type(value))
    if encode is not None:
        return encode(value)
    if isinstance(value, np.generic | np.dtype):
        return _array(np.asarray(value)) if isinstance(value, np.generic) else text(value.str)
    if isinstance(value, _STATELESS):
        name = value.name if isinstance(value, logging.Logger) else ""
        return b"stateless" + text(type(value).__qualname__) + text(name)
    if isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return b"operator" + text(str(value))
    if type(value).__module__ == "typing" or isinstance(
        value, types.GenericAlias | types.UnionType
    ):
        return b"type" + text(str(value))
    if isinstance(value, np.ndarray) and type(value) is np.ndarray and not value.dtype.hasobject:
        return _array(value)
    return None


def _array(array: np.ndarray[Any, Any]) -> bytes:
    head = text(f"{array.dtype.str}{array.dtype.descr}{array.shape}")
    return b"array" + head + xxhash.xxh3_128_digest(array.tobytes())


def plain(value: object, depth: int = 4) -> bool:
    """Whether a value is an atom, or a container of nothing else."""
    if type(value) in _ATOMS:
        return True
    if type(value) not in _CONTAINERS or depth == 0:
        return False
    if isinstance(value, dict):
        return all(plain(k, depth - 1) and plain(v, depth - 1) for k, v in value.items())
    return all(plain(item, depth - 1) for item in value)  # type: ignore[attr-defined]


def rank(value: object) -> bytes | None:
    """Where a value stands among the members of a set, the same in every process. None: nowhere."""
    encoded = atom(value)
    if encoded is not None:
        return encoded
    if isinstance(value, enum.Enum):
        return b"enum" + text(f"{type(value).__qualname__}.{value.name}")
    if isinstance(value, type):
        return b"class" + text(f"{value.__module__}.{value.__qualname__}")
    if isinstance(value, types.FunctionType) and not value.__closure__:
        return b"function" + digest(value.__code__)
    if isinstance(value, tuple | frozenset):
        ranks = [rank(item) for item in value]
        if isinstance(value, frozenset):
            ranks.sort(key=lambda r: r or b"")
        if None not in ranks:
            return b"(" + b"".join(b"%d:%b" % (len(r), r) for r in ranks if r is not None) + b")"
    return None


def ordered(values: Iterable[Any]) -> list[Any] | None:
    """The values in an order that does not depend on the process; None where there is none."""
    ranked = [(rank(value), value) for value in values]
    if any(r is None for r, _ in ranked):
        return None
    return [value for _, value in sorted(ranked, key=lambda pair: pair[0] or b"")]


def functions(value: object) -> list[types.FunctionType]:
    """The functions that a member of a class consists of; none where it is something else."""
    if isinstance(value, types.FunctionType):
        return [value]
    if isinstance(value, staticmethod | classmethod):
        return functions(value.__func__)
    if isinstance(value, property):
        return [f for part in (value.fget, value.fset, value.fdel) for f in functions(part)]
    if isinstance(value, functools.cached_property):
        return functions(value.func)
    if isinstance(value, functools.partialmethod) and not value.args and not value.keywords:
        return functions(value.func)
    return []


def cells(function: types.FunctionType) -> list[Any]:
    """What a function closes over; None for what is not yet there."""
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:
            found.append(None)
    return found


def digests(function: Any) -> list[bytes]:
    """Of a function and those that it wraps."""
    found = []
    while isinstance(function, types.FunctionType):
        found.append(digest(function.__code__))
        function = function.__dict__.get("__wrapped__")
    return found


# By the base's own methods: a subclass may answer otherwise, or do work when asked.
_CONTENT: dict[type, Callable[[Any], Any]] = {
    collections.OrderedDict: lambda v: dict(collections.OrderedDict.items(v)),
    dict: lambda v: dict(dict.items(v)),
    list: lambda v: list(list.__iter__(v)),
    tuple: lambda v: tuple(tuple.__iter__(v)),
    set: lambda v: set(set.__iter__(v)),
    frozenset: lambda v: frozenset(frozenset.__iter__(v)),
    str: lambda v: str.__str__(v),
    int: int.__int__,
    float: float.__float__,
    bytes: lambda v: bytes.__getitem__(v, slice(None)),
}


def builtin_content(value: object) -> Any:
    """What an instance of a subclass of a builtin holds as such; None for other objects."""
    for base, content in _CONTENT.items():
        if isinstance(value, base):
            return content(value)
    return None


def label(value: Any) -> str:
    """The full name of something that a version number stands for."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "?")
    return f"{getattr(value, '__module__', None)}.{name}"


def has_hidden_state(cls: type) -> bool:
    """Whether instances hold more than `__dict__` and slots: state of a type written in C.

    The arithmetic is that of `object.__reduce_ex__`.
    """
    size = object.__basicsize__
    word = tuple.__itemsize__
    size += word * ((cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0))
    return cls.__basicsize__ > size + word * len(slots(cls))


def slots(cls: type) -> list[types.MemberDescriptorType]:
    """The `__slots__` of a class and its bases."""
    return [member for base in cls.__mro__ for _, member in sorted(vars(base).items(), key=_first)
            if isinstance(member, types.MemberDescriptorType)]  # fmt: skip


def _first(pair: tuple[str, object]) -> str:
    return pair[0]


def reduced(value: Any) -> list[Any]:
    """The parts that copying an object of a C type goes by. Raises what the type raises."""
    reduce = copyreg.dispatch_table.get(type(value))
    parts = reduce(value) if reduce is not None else value.__reduce_ex__(2)
    if isinstance(parts, str):
        return [parts]
    # The fourth and fifth are iterators over items.
    return [*parts[:3], *(list(part) for part in parts[3:5] if part is not None)]
