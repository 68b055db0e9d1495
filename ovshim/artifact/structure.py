"""Containers and constants as JSON: the structure of a call and of an output, without code.

A node is `"*"` for a leaf, or a list: `["tuple", nodes]`, `["list", nodes]`, `["size", nodes]`,
`["dict", keys, nodes]`, `["ordered", keys, nodes]`, `["namedtuple", name, fields, nodes]`,
`["record", name, fields, nodes, absent]`. A record is what was an object of a class of the user's:
whoever reads it gets the same fields without the class, for no name in a file is ever imported.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import keyword
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from ovshim.signature import Const, Kind, Structure, TensorLeaf, flatten, text_of

__all__ = [
    "Fields",
    "Unportable",
    "const_from_json",
    "const_to_json",
    "dtype_named",
    "kind_from_json",
    "kind_to_json",
    "structure_from_json",
    "structure_to_json",
    "whole",
]

_PLAIN = {tuple: "tuple", list: "list", torch.Size: "size"}
_KEYED = {dict: "dict", collections.OrderedDict: "ordered"}
_DTYPES = {str(d).removeprefix("torch."): d
           for d in vars(torch).values() if isinstance(d, torch.dtype)}  # fmt: skip


class Unportable(Exception):
    """Something that cannot be written down without its code."""


class Fields:
    """An output whose class stayed behind: its fields as attributes, by name and by position."""

    def keys(self) -> tuple[str, ...]:
        """The names of the fields."""
        return tuple(field.name for field in dataclasses.fields(self))  # type: ignore[arg-type]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values of the fields."""
        return tuple(vars(self)[name] for name in Fields.keys(self))

    def items(self) -> list[tuple[str, Any]]:
        """Names and values."""
        return list(zip(Fields.keys(self), Fields.to_tuple(self), strict=True))

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in Fields.keys(self):
                raise KeyError(key)
            return vars(self)[key]
        return Fields.to_tuple(self)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(Fields.keys(self))

    def __len__(self) -> int:
        return len(Fields.keys(self))


# --- structures -----------------------------------------------------------------------------------


def structure_to_json(structure: Structure, *, records: bool = True) -> Any:
    """The node of a structure.

    Args:
        records: whether classes of the user's may become records. In an input they may not:
            whoever calls has not got the class.

    Raises `Unportable`.
    """
    nested = {i: (inside, sub) for i, inside, sub in structure.nested}
    leaf = itertools.count()

    def record(cls: type, names: Sequence[str], nodes: list[Any]) -> Any:
        if not records:
            raise Unportable(f"an argument of class {cls.__qualname__}")
        known = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else ()
        for name in (*names, *known):
            if not _is_identifier(name):
                raise Unportable(f"a field named {name!r}")
        absent = sorted(set(known) - set(names))
        return ["record", cls.__name__, list(names), nodes, absent]

    def node(spec: pytree.TreeSpec) -> Any:
        if spec.is_leaf():
            i = next(leaf)
            if i not in nested:
                return "*"
            inside, sub = nested[i]
            nodes = structure_to_json(sub, records=records)[1]
            return record(inside.cls, inside.names, nodes)
        nodes = [node(child) for child in spec.children()]
        kind = spec.type
        if kind in _PLAIN:
            return [_PLAIN[kind], nodes]
        if kind in _KEYED:
            if not all(type(key) in (str, int) for key in spec.context):
                raise Unportable(f"a dict with keys {list(spec.context)!r}")
            return [_KEYED[kind], list(spec.context), nodes]
        cls = spec.context if isinstance(spec.context, type) else kind
        if isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields"):
            if not records:
                raise Unportable(f"an argument of class {cls.__qualname__}")
            return ["namedtuple", cls.__name__, list(cls._fields), nodes]
        if isinstance(kind, type) and issubclass(kind, collections.OrderedDict):
            return record(kind, list(map(str, spec.context)), nodes)
        raise Unportable(f"a container of class {getattr(kind, '__qualname__', kind)}")

    return node(structure.spec)


def structure_from_json(stored: Any) -> Structure:
    """The structure of a node. Raises TypeError or ValueError for what is none."""
    return flatten(_value(stored))[1]


def _value(node: Any) -> Any:
    """A value of that structure, each leaf a 0."""
    if node == "*":
        return 0
    if not isinstance(node, list) or not node:
        raise ValueError(f"{node!r} is no structure")
    match node:
        case [("tuple" | "list" | "size") as name, list(nodes)]:
            values = list(map(_value, nodes))
            return {"tuple": tuple, "list": list, "size": torch.Size}[name](values)
        case [("dict" | "ordered") as name, list(keys), list(nodes)]:
            if not all(type(key) in (str, int) for key in keys):
                raise ValueError("keys are names or numbers")
            pairs = zip(keys, map(_value, nodes), strict=True)
            return collections.OrderedDict(pairs) if name == "ordered" else dict(pairs)
        case ["namedtuple", str(name), list(fields), list(nodes)]:
            made = _named_tuple(_identifier(name), tuple(map(_identifier, fields)))
            return made(*map(_value, nodes))
        case ["record", str(name), list(fields), list(nodes), list(absent)]:
            names = tuple(map(_identifier, fields))
            cls = _record(_identifier(name), names, tuple(map(_identifier, absent)))
            return cls(**dict(zip(names, map(_value, nodes), strict=True)))
    raise ValueError(f"{node[0]!r} is no structure")


@functools.lru_cache(maxsize=1024)
def _named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, fields)


@functools.lru_cache(maxsize=1024)
def _record(name: str, fields: tuple[str, ...], absent: tuple[str, ...]) -> Any:
    # What was None in the original is None here.
    namespace = dict.fromkeys(absent)
    # With a field of its own each: methods of `Fields` would be the defaults of their names.
    own = [(field, Any, dataclasses.field()) for field in fields]
    return dataclasses.make_dataclass(name, own, bases=(Fields,), namespace=namespace, eq=False)


def _identifier(name: Any) -> str:
    if not _is_identifier(name):
        raise ValueError(f"{name!r} is no name of a field")
    return str(name)


def _is_identifier(name: Any) -> bool:
    plain = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
    return plain and not name.startswith("__")


# --- kinds of calls -------------------------------------------------------------------------------


def kind_to_json(kind: Kind) -> dict[str, Any]:
    """A kind of call. Raises `Unportable`."""
    leaves: list[Any] = []
    for leaf in kind.leaves:
        if isinstance(leaf, TensorLeaf):
            dtype = str(leaf.dtype).removeprefix("torch.")
            leaves.append([dtype, leaf.rank, leaf.layout, leaf.same_as])
        else:
            leaves.append({"const": const_to_json(leaf.value)})
    return {"structure": structure_to_json(kind.structure, records=False), "leaves": leaves}


def kind_from_json(stored: Any) -> Kind:
    """The kind that was written. Raises TypeError, KeyError or ValueError for what is none."""
    leaves: list[TensorLeaf | Const] = []
    for leaf in stored["leaves"]:
        if isinstance(leaf, dict):
            value = const_from_json(leaf["const"])
            leaves.append(Const(type(value), text_of(value), value))
            continue
        dtype, rank, layout, same_as = leaf
        if type(layout) is not str:
            raise ValueError("a tensor's layout is a text")
        leaves.append(TensorLeaf(dtype_named(dtype), whole(rank), layout, whole(same_as)))
    kind = Kind(structure_from_json(stored["structure"]), tuple(leaves))
    if len(flatten(_value(stored["structure"]))[0]) != len(leaves):
        raise ValueError("a call has other leaves than its structure")
    for leaf in leaves:
        if isinstance(leaf, TensorLeaf) and not isinstance(leaves[leaf.same_as], TensorLeaf):
            raise ValueError("a tensor is the same as another")
    return kind


# --- constants ------------------------------------------------------------------------------------


def const_to_json(value: Any) -> Any:
    """A constant: None, booleans, whole numbers and texts as they are, others with their type.

    Raises `Unportable`.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return {"float": value.hex()}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is torch.Size:
        return {"size": list(value)}
    if kind is slice:
        return {"slice": [const_to_json(v) for v in (value.start, value.stop, value.step)]}
    if kind in (torch.dtype, torch.layout, torch.memory_format, torch.device):
        return {kind.__name__: str(value).removeprefix("torch.")}
    if value is ...:
        return {"ellipsis": None}
    raise Unportable(f"a constant of class {kind.__qualname__}")


def const_from_json(stored: Any) -> Any:
    """The constant that was written. Raises TypeError or ValueError for what is none."""
    if stored is None or type(stored) in (bool, int, str):
        return stored
    ((name, value),) = stored.items()
    match name:
        case "float":
            return float.fromhex(value)
        case "complex":
            return complex(*map(float.fromhex, value))
        case "bytes":
            return bytes.fromhex(value)
        case "size":
            return torch.Size(map(whole, value))
        case "slice":
            start, stop, step = map(const_from_json, value)
            return slice(start, stop, step)
        case "dtype":
            return dtype_named(value)
        case "device":
            return torch.device(value)
        case "layout" | "memory_format":
            found = getattr(torch, value, None)
            if isinstance(found, torch.layout | torch.memory_format):
                return found
        case "ellipsis":
            return ...
    raise ValueError(f"{stored!r} is no constant")


def dtype_named(name: Any) -> torch.dtype:
    """The dtype of that name. ValueError where there is none."""
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"{name!r} is no dtype")
    return _DTYPES[name]


def whole(value: Any) -> int:
    """A whole number from 0 up. ValueError for anything else: what is read here becomes code."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number from 0 up")
    return value
