"""Integers: OpenVINO computes many an operator in float32, which holds integers up to 2**24 only,
and lets narrow types saturate where eager wraps."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ovshim.capture import CaptureError
from ovshim.capture.magnitudes import Magnitude, magnitude
from ovshim.capture.rewrites.entry import (
    INTEGERS,
    NARROW,
    WIDE,
    Function,
    Rewrite,
    argument,
    dtype_of,
    in_place,
    narrowed,
    tensor_of,
    wrapping,
)
from ovshim.reasons import reason

__all__ = ["TABLE"]

# --- arithmetic -------------------------------------------------------------------------------


def _narrow(function: Function, write: bool = False) -> Any:
    wrapped = in_place(wrapping(function)) if write else wrapping(function)

    def choose(node: Node) -> Function | None:
        return wrapped if dtype_of(node) in NARROW and "out" not in node.kwargs else None

    return choose


def through_int64(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A conversion to a narrow type, in two steps: the second one wraps."""
    return narrowed(x.to(torch.int64), dtype)


def _conversion(node: Node) -> Function | None:
    given, made = dtype_of(node.args[0]), dtype_of(node)
    if given is None or made not in NARROW:
        return None
    if not given.is_floating_point and (made is not torch.int16 or given not in WIDE):
        return None  # OpenVINO's own conversion wraps
    node.args, node.kwargs = (node.args[0], made), {}
    return through_int64


def product(base: torch.Tensor, exponent: int) -> torch.Tensor:
    """`base ** exponent` by multiplications."""
    times = wrapping(operator.mul)
    made = base
    for _ in range(exponent - 1):
        made = times(made, base)
    return made


def _power(node: Node) -> Function | None:
    if dtype_of(node) not in INTEGERS or "out" in node.kwargs:
        return None
    square = getattr(node.target, "__name__", node.target) == "square"
    exponent = 2 if square else argument(node, 1, "exponent")
    if type(exponent) is int and 1 < exponent <= 8:
        node.args, node.kwargs = (node.args[0], exponent), {}
        return product
    if dtype_of(node) in NARROW and exponent not in (0, 1):
        _refused(node)
    return None


def limited_as_floats(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`x.clamp(...)` of integers between floats: the result is floats."""
    return x.to(torch.get_default_dtype()).clamp(*args, **kwargs)


def _clamp(node: Node) -> Function | None:
    given = dtype_of(node.args[0])
    changed = given in INTEGERS and dtype_of(node) is not given and "out" not in node.kwargs
    return limited_as_floats if changed else None


# --- comparison -------------------------------------------------------------------------------


def equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a == b` of integers."""
    return (a ^ b) == 0


def unequal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a != b` of integers."""
    return (a ^ b) != 0


def order(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Negative, zero or positive as `a` is less than, equal to or greater than `b`; halves are
    compared first, whose difference cannot overflow."""
    halves = (a >> 1) - (b >> 1)
    return torch.where(halves == 0, (a & 1) - (b & 1), halves)


def less(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a < b` of integers."""
    return order(a, b) < 0


def at_most(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a <= b` of integers."""
    return order(a, b) <= 0


def greater(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a > b` of integers."""
    return order(a, b) > 0


def at_least(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a >= b` of integers."""
    return order(a, b) >= 0


def _comparison(function: Function) -> Any:
    """Both sides may be 2**24 and more: then float32 cannot tell neighbours apart. A number on one
    side that is smaller than that is told apart from everything."""

    def choose(node: Node) -> Function | None:
        if len(node.args) != 2 or node.kwargs:
            return None
        large = all(magnitude(x) > Magnitude.SMALL for x in node.args)
        return function if large else None

    return choose


# --- operators that give other types than OpenVINO's --------------------------------------------


def as_int64(function: Function) -> Function:
    """The operator on 64-bit integers: eager sums and multiplies all others in those."""

    def widened(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(x.to(torch.int64), *args, **kwargs)

    return widened


def _accumulation(function: Function) -> Any:
    wide = as_int64(function)

    def cut(x: torch.Tensor, *args: Any, dtype: torch.dtype, **kwargs: Any) -> torch.Tensor:
        return narrowed(wide(x, *args, **kwargs), dtype)

    def choose(node: Node) -> Function | None:
        tensor = tensor_of(node.args[0])
        if tensor is None or tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            return None
        if node.kwargs.get("dtype") in NARROW and "out" not in node.kwargs:
            return cut
        plain = not node.kwargs.keys() & {"dtype", "out"}
        return wide if plain and tensor.dtype is not torch.int64 else None

    return choose


def _refused(node: Node) -> None:
    name = getattr(node.target, "__name__", node.target)
    raise CaptureError(reason("unsupported-op", f"{name}, which OpenVINO computes wrongly"))


def _spelt(target: Function, *names: str) -> tuple[Function | str, ...]:
    """An operator, its functions and its methods."""
    return target, *(getattr(torch, name) for name in names), *names


_SATURATE = "saturates where eager wraps"
_IN_FLOAT = "computed in float32, which holds integers up to 2**24"

TABLE = (
    *(
        Rewrite(_spelt(target, *names), _narrow(function), _SATURATE)
        for target, names, function in (
            (operator.add, ("add",), torch.add),
            (operator.sub, ("sub", "subtract"), torch.sub),
            (torch.rsub, ("rsub",), torch.rsub),
            (operator.mul, ("mul", "multiply"), operator.mul),
            (operator.neg, ("neg", "negative"), operator.neg),
            (operator.abs, ("abs", "absolute"), operator.abs),
            (operator.lshift, ("bitwise_left_shift",), operator.lshift),
            (operator.matmul, ("matmul",), operator.matmul),
            (torch.bmm, ("bmm",), torch.bmm),
            (torch.mm, ("mm",), torch.mm),
        )
    ),
    *(
        Rewrite((target, name), _narrow(function, write=True), _SATURATE)
        for target, name, function in (
            (operator.iadd, "add_", torch.add),
            (operator.isub, "sub_", torch.sub),
            (operator.imul, "mul_", operator.mul),
            (operator.ilshift, "bitwise_left_shift_", operator.lshift),
        )
    ),
    Rewrite(("to", "type", "byte", "char", "short", "type_as"), _conversion, _SATURATE),
    Rewrite((operator.pow, torch.pow, "pow", torch.square, "square"), _power, _IN_FLOAT),
    Rewrite((torch.clamp, "clamp", torch.clip, "clip"), _clamp, "stays with integers"),
    Rewrite((operator.eq, torch.eq, "eq"), _comparison(equal), _IN_FLOAT),
    Rewrite((operator.ne, torch.ne, "ne"), _comparison(unequal), _IN_FLOAT),
    Rewrite((operator.lt, torch.lt, "lt"), _comparison(less), _IN_FLOAT),
    Rewrite((operator.le, torch.le, "le"), _comparison(at_most), _IN_FLOAT),
    Rewrite((operator.gt, torch.gt, "gt"), _comparison(greater), _IN_FLOAT),
    Rewrite((operator.ge, torch.ge, "ge"), _comparison(at_least), _IN_FLOAT),
    Rewrite((torch.cumsum, "cumsum"), _accumulation(torch.cumsum), "keeps a narrower type"),
    Rewrite((torch.prod, "prod"), _accumulation(torch.prod), "keeps a narrower type"),
    Rewrite((torch.sum, "sum"), _accumulation(torch.sum), "keeps a narrower type"),
    Rewrite((torch.gcd, "gcd"), _refused, "wrong signs, and wrong where it broadcasts"),
)
