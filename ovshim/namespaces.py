"""What torch's own functions call by name, which a patch may replace for a while.

Dynamo takes a function of `torch.nn.functional` whole and guards its name, and nothing that it
calls. So all that can be called is watched, in the namespaces in which the functions and layers of
torch find what they compute by: of each the count of writes, and only after a write, which is
mostly an import, the names, also those that have come since.
"""

from __future__ import annotations

import gc
import types
from typing import Any

import torch
import torch.nn.functional as F

from ovshim.conditions import Conditions
from ovshim.dict_versions import add_unless_written, version_of

__all__ = ["SPACES", "add_unless_replaced"]


def _of_class(cls: type) -> list[dict[str, Any]]:
    """The dictionary behind a class's `__dict__`, which counts its writes."""
    return [held for held in gc.get_referents(cls.__dict__) if type(held) is dict]


SPACES: tuple[dict[str, Any], ...] = (
    *map(vars, (torch, F, torch._C._nn, torch.functional, torch.linalg, torch._VF)),
    *_of_class(torch.Tensor),
)

_CALLED = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType)

# Of each namespace the names, and what they stood for when they were last looked at: some 1,300,
# of which not every plan needs lists of its own.
_last: dict[int, tuple[list[str], list[Any]]] = {}


def add_unless_replaced(conditions: Conditions) -> None:
    """Add that each name stands for what it does now; not where writes are not counted, as without
    the interpreter's lock: to look at all of them takes as long as a small module."""
    if version_of is None:
        return
    names = Conditions()
    for space in SPACES:
        names.add("{0}({1}) == {2}", _looked_up, space, _looked_up(space))
    add_unless_written(conditions, SPACES, names.compiled())


def _looked_up(space: dict[str, Any]) -> tuple[list[str], list[Any]]:
    called = [name for name, value in list(space.items()) if isinstance(value, _CALLED)]
    found = list(map(space.get, called))
    last = _last.get(id(space))
    if last is None or last != (called, found):
        last = _last[id(space)] = called, found
    return last
