"""What torch's own functions call by name, which a patch may replace for a while.

Dynamo takes a function of `torch.nn.functional` whole and guards its name, and nothing that it
calls. So all that can be called is watched, in the three namespaces in which the functions and
layers of torch find what they compute by: of each the count of writes, and only after a write,
which is mostly an import, the names.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F

from ovshim.conditions import Conditions
from ovshim.dict_versions import add_unless_written

__all__ = ["SPACES", "add_unless_replaced"]

SPACES = tuple(map(vars, (torch, F, torch._C._nn)))

_CALLED = (types.FunctionType, types.BuiltinFunctionType)

# Of each namespace the names, and what they stood for when they were last looked at: some 1,300,
# of which not every plan needs lists of its own.
_last: dict[int, tuple[list[str], list[Any]]] = {}


def add_unless_replaced(conditions: Conditions) -> None:
    """Add that each name stands for what it does now."""
    names = Conditions()
    for space in SPACES:
        called, found = _looked_up(space)
        names.add("list(map({0}, {1})) == {2}", space.get, called, found)
    add_unless_written(conditions, SPACES, names.compiled())


def _looked_up(space: dict[str, Any]) -> tuple[list[str], list[Any]]:
    called = [name for name, value in list(space.items()) if isinstance(value, _CALLED)]
    found = list(map(space.get, called))
    last = _last.get(id(space))
    if last is None or last != (called, found):
        last = _last[id(space)] = called, found
    return last
