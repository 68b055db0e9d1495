"""Threads inside a build: what they call is eager's, for eager is the measure; and their modes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Self

import torch

from ovshim import stays

__all__ = [
    "Backward",
    "Building",
    "building_here",
    "look_aside",
    "own_modes",
    "serving",
    "switched_off",
]

_here = threading.local()
_count_lock = threading.Lock()
running = 0
"""How many builds run in this process, and how many blocks of `disabled()`. The hot path reads it
before it asks for the thread and its context."""


def building_here() -> bool:
    """Whether this thread is inside a build: what it calls has to be eager, for eager is the
    measure there, also where one accelerated module calls another."""
    return getattr(_here, "depth", 0) > 0


def switched_off() -> bool:
    """Whether eager is to answer in this context: it is in a block of `disabled()`."""
    return stays.switched_off() and not getattr(_here, "serving", False)


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """Within a build: calls are served here as they will be, for what is measured are plans."""
    depth, _here.depth = getattr(_here, "depth", 0), 0
    outer, _here.serving = getattr(_here, "serving", False), True
    try:
        yield
    finally:
        _here.depth, _here.serving = depth, outer


def look_aside(more: int) -> None:
    """Have the hot path ask for threads and contexts, so many times more (or less, if negative)."""
    global running
    with _count_lock:
        running += more


@contextlib.contextmanager
def own_modes(grad: bool) -> Iterator[None]:
    """The modes of torch that a build runs in, whatever its caller is in.

    Args:
        grad: whether gradients are recorded.
    """
    # Under inference mode every tensor made here would be one for ever, and without versions.
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(grad),
        torch.autocast("cpu", enabled=False),
    ):
        yield


class Building:
    """Marks this thread as one that builds."""

    def __enter__(self) -> Self:
        look_aside(1)
        # Last: with an interrupt behind it this thread would stay with eager for good.
        _here.depth = getattr(_here, "depth", 0) + 1
        return self

    def __exit__(self, *exc: object) -> None:
        _here.depth -= 1
        look_aside(-1)


class Backward(Building):
    """Entered while a backward pass runs the module again.

    Attributes:
        seen: whether one ever did.
    """

    seen = False

    def __enter__(self) -> Self:
        self.seen = True
        return super().__enter__()
