"""How large the integers of a captured graph may be, as far as its operators tell."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch.fx import Node

__all__ = ["CASTS", "Magnitude", "is_of_floats", "magnitude", "name_of"]

_MARK = "ovshim_magnitude"
_WIDE = (torch.int64, torch.int32)

# Operators that give places or counts, whatever the values.
_PLACES = frozenset({"argmax", "argmin", "argsort", "bucketize", "searchsorted", "count_nonzero"})
_MULTIPLY = frozenset({"mul", "imul", "mul_", "pow", "ipow", "square", "product", "lshift"})
CASTS = frozenset({"to", "long", "int", "type", "type_as"})


class Magnitude(IntEnum):
    """Of integers: of sizes and places, beyond 2**24 by multiplication, or of any values given."""

    SMALL = 0
    MULTIPLIED = 1
    GIVEN = 2


def magnitude(x: Any) -> Magnitude:
    """That of a node's integers, or of a number; floats and booleans have none."""
    if not isinstance(x, Node):
        beyond = isinstance(x, int) and abs(x) >= 2**24
        return Magnitude.MULTIPLIED if beyond else Magnitude.SMALL
    if _MARK not in x.meta:
        x.meta[_MARK] = _of(x)
    found: Magnitude = x.meta[_MARK]
    return found


def _of(node: Node) -> Magnitude:
    value, name = node.meta.get("example_value"), name_of(node)
    several = isinstance(value, (tuple, list))  # values and their places
    if not several and not (isinstance(value, torch.Tensor) and value.dtype in _WIDE):
        return Magnitude.SMALL
    if node.op in ("placeholder", "get_attr"):
        return Magnitude.GIVEN
    if name in _PLACES:
        return Magnitude.SMALL
    if name in CASTS and is_of_floats(node.args[0]):
        return Magnitude.GIVEN
    least = Magnitude.MULTIPLIED if name in _MULTIPLY else Magnitude.SMALL
    return max([least, *map(magnitude, node.all_input_nodes), *map(magnitude, node.args)])


def is_of_floats(node: Any) -> bool:
    """Whether a node gives floats; with their places, where it gives those as well."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    value = value[0] if isinstance(value, tuple) and value else value
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def name_of(node: Node) -> str:
    """The name of a node's function or method."""
    return str(getattr(node.target, "__name__", node.target))
