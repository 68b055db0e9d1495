"""Edits that are done to a module between two calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from conformance.entries import Edit

__all__ = ["do", "put", "written"]


def put(name: str, value: Any) -> Edit:
    """Sets an attribute, on the way of a dotted path."""

    def apply(module: nn.Module) -> None:
        *way, last = name.split(".")
        held = functools.reduce(getattr, way, module)
        setattr(held, last, value() if callable(value) and not isinstance(value, type) else value)

    return Edit(f"{name} set", apply)


def do(name: str, apply: Callable[[Any], Any]) -> Edit:
    return Edit(name, lambda module: (apply(module), None)[1])


def written(weight: Tensor) -> None:
    """Writes to a square weight in place."""
    with torch.no_grad():
        weight.copy_(torch.eye(weight.shape[0]))
