"""What a table of replacements consists of, and what its functions share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

__all__ = [
    "INTEGERS",
    "NARROW",
    "VERDICT",
    "WIDE",
    "Function",
    "Rewrite",
    "Target",
    "always",
    "argument",
    "dtype_of",
    "in_place",
    "narrowed",
    "of_floats",
    "tensor_of",
    "value_of",
    "wrapping",
]

VERDICT = "ovshim_verdict"
"""Marks a node whose boolean says whether OpenVINO may answer this call."""

Function = Callable[..., Any]
Target = Function | str

NARROW = (torch.uint8, torch.int8, torch.int16)
WIDE = (torch.int32, torch.int64)
INTEGERS = (*NARROW, *WIDE)


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """One replacement.

    Attributes:
        targets: what is replaced: functions, and names of methods.
        function: takes the node, whose arguments it may change, and gives the target to call
            instead; None where this node is not concerned. Raises CaptureError where there is no
            exact replacement.
        reason: what goes wrong without it.
        until: the version of OpenVINO from which it may be dropped; None while none is known.
    """

    targets: tuple[Target, ...]
    function: Callable[[Node], Function | None]
    reason: str
    until: str | None = None


def always(function: Function) -> Callable[[Node], Function | None]:
    """Every call is replaced, but one that writes its result elsewhere."""
    return lambda node: None if "out" in node.kwargs else function


def of_floats(function: Function) -> Callable[[Node], Function | None]:
    """Calls on floats alone, and for their own dtype. Of integers sums and products wrap, and have
    operators of their own for it."""

    def choose(node: Node) -> Function | None:
        dtypes = [dtype_of(x) for x in node.all_input_nodes]
        floats = all(dtype is not None and dtype.is_floating_point for dtype in dtypes)
        return function if floats and not node.kwargs.keys() & {"out", "dtype"} else None

    return choose


def value_of(node: Any) -> Any:
    """What Dynamo knows of a node's result: a fake tensor, a symbolic number, a tuple of such."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def tensor_of(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node; None where its result is something else."""
    value = value_of(node)
    return value if isinstance(node, Node) and isinstance(value, torch.Tensor) else None


def dtype_of(node: Any) -> torch.dtype | None:
    tensor = tensor_of(node)
    return None if tensor is None else tensor.dtype


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def in_place(function: Function) -> Function:
    """The form of an operator that writes its result into its first argument."""

    def written(into: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return into.copy_(function(into, *args, **kwargs))

    return written


def wrapping(function: Function) -> Function:
    """The operator on integers, those of narrow types computed in 32 bits and cut to their own:
    OpenVINO's arithmetic saturates."""

    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        of = torch.result_type(*args[:2]) if len(args) > 1 else args[0].dtype
        if of in NARROW:
            args = tuple(_widened(x, of) for x in args)
        return narrowed(function(*args, **kwargs), of)

    return wrapped


def narrowed(x: torch.Tensor, of: torch.dtype) -> torch.Tensor:
    """Integers cut to another type. OpenVINO's conversion wraps, but to 16 bits there is none: it
    computes those in 32 (2026.4)."""
    if of is torch.int16 and x.dtype in WIDE:
        x = ((x & 0xFFFF) ^ 0x8000) - 0x8000
    return x.to(of)


def _widened(x: Any, of: torch.dtype) -> Any:
    if isinstance(x, torch.Tensor):
        return x.to(torch.int32)
    limits = torch.iinfo(of)
    return (x - limits.min) % (limits.max - limits.min + 1) + limits.min
