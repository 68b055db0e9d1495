"""Which modules have an object in their `__dict__`, and which of them a call is of."""

from __future__ import annotations

import gc
from types import FrameType
from typing import Any

from torch import nn

from ovshim import garbage

__all__ = ["holders", "the_one"]


def holders(thing: object, caller: FrameType | None) -> list[nn.Module]:
    """Returns the modules that have `thing` in their `__dict__`.

    Asks the garbage collector, some milliseconds: done once after a copy, not per call. The
    locals of the calling frame are looked at too, because the collector does not see what
    the program has put aside by `gc.freeze()`.
    """
    dicts: list[Any] = []
    modules: list[Any] = list(caller.f_locals.values()) if caller is not None else []
    with garbage.whole():
        for referrer in gc.get_referrers(thing):
            (dicts if type(referrer) is dict else modules).append(referrer)
        modules += gc.get_referrers(*dicts) if dicts else []
    found = {
        id(module): module
        for module in modules
        if issubclass(type(module), nn.Module)
        and any(value is thing for value in module.__dict__.values())
    }
    return list(found.values())


def the_one(owners: list[nn.Module], frame: FrameType | None, depth: int) -> nn.Module:
    """Returns the only owner, or the only one that a frame near the call has among its locals.

    `nn.Module._call_impl` has `self` there, so every `module(...)` is told apart; what is not
    is a direct `copied.method(...)` as the first use of a hand-made copy beside its original.
    Raises RuntimeError then: guessing could answer with the wrong module's attributes.
    """
    for _ in range(depth if len(owners) > 1 else 0):
        if frame is None:
            break
        values = list(frame.f_locals.values())
        near = [owner for owner in owners if any(owner is value for value in values)]
        if len(near) == 1:
            return near[0]
        frame = frame.f_back
    if len(owners) > 1:
        names = ", ".join(type(owner).__name__ for owner in owners)
        raise RuntimeError(
            f"{len(owners)} modules ({names}) were copied from one accelerated module by their "
            "__dict__, and this use does not tell which is meant. They have been told apart now: "
            "do the same again, or call a copied module as module(...) first."
        )
    return owners[0]
