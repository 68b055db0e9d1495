"""Division. OpenVINO rounds quotients of integers towards zero and computes them in float32; its
quotients of floats may be off by the last digit, so that 2730.0 / 7.0 is more than 390, and 20.5
// 20.5 is 0."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from ovshim.capture.rewrites.entry import (
    INTEGERS,
    Function,
    Rewrite,
    argument,
    dtype_of,
    in_place,
    value_of,
    wrapping,
)

__all__ = ["TABLE", "floor_divide", "truncated_divide"]

# --- integers ---------------------------------------------------------------------------------


def floor_divide(a: Any, b: Any) -> Any:
    """`a // b` of integers, exact whether `//` rounds down (eager's), towards zero, or is computed
    in float32 (OpenVINO's both): what is off is divided once more, then mended by one."""
    quotient = a // b
    rest = a - quotient * b
    more = rest // b
    rest = rest - more * b
    return quotient + more - _opposed(rest, b).to(quotient.dtype)


def _opposed(a: Any, b: Any) -> Any:
    """Where of two numbers, of which one at least is a tensor, one is below and one above zero."""
    if not isinstance(a, torch.Tensor):
        a, b = b, a
    if not isinstance(b, torch.Tensor):
        return a < 0 if b > 0 else a > 0
    return ((a < 0) & (b > 0)) | ((a > 0) & (b < 0))


def remainder(a: Any, b: Any) -> Any:
    """`a % b` of integers."""
    return a - floor_divide(a, b) * b


def truncated_divide(a: Any, b: Any) -> Any:
    """`torch.div(a, b, rounding_mode="trunc")` of integers."""
    quotient = floor_divide(a, b)
    above = (a - quotient * b != 0) & _opposed(a, b)
    return quotient + above.to(quotient.dtype)


def truncated_remainder(a: Any, b: Any) -> Any:
    """`torch.fmod(a, b)` of integers."""
    return a - truncated_divide(a, b) * b


def shifted(a: torch.Tensor, b: int) -> torch.Tensor:
    """`a // b` for a power of two, in one exact operator."""
    return a >> (b.bit_length() - 1)


def masked(a: torch.Tensor, b: int) -> torch.Tensor:
    """`a % b` for a power of two."""
    return a & (b - 1)


# --- floats -----------------------------------------------------------------------------------


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A float as the sum of two of 12 significant bits (Veltkamp's splitting)."""
    large = x * 4097.0
    high = large - (large - x)
    return high, x - high


def _rest(a: torch.Tensor, quotient: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a - quotient * b` without rounding the product (Dekker's). All products of halves are exact,
    so that it is the same whether a compiler fuses multiplications with additions or not."""
    product = quotient * b
    one, two = _halves(quotient)
    three, four = _halves(b)
    error = ((one * three - product) + one * four + two * three) + two * four
    rest: torch.Tensor = (a - product) - error
    return rest


def quotient_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a / b` rounded as IEEE 754 has it."""
    quotient = a / b
    more = _rest(a, quotient, b) / b
    return torch.where(more.abs() < math.inf, quotient + more, quotient)


def _in_float32(function: Function) -> Function:
    """A function of two tensors of float32, for tensors of any type and numbers."""

    def computed(a: Any, b: Any) -> torch.Tensor:
        of = torch.result_type(a, b)
        of = of if of.is_floating_point else torch.get_default_dtype()
        one, other = (torch.as_tensor(x).to(torch.float32) for x in (a, b))
        made: torch.Tensor = function(one, other).to(of)
        return made

    return computed


def _floor(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """As eager has it, step by step (ATen's `div_floor_floating`): its roundings show in quotients
    of millions."""
    rest = _fmod(a, b)
    exact = quotient_of(a - rest, b)
    exact = torch.where(_opposed(rest, b), exact - 1, exact)
    whole = torch.floor(exact)
    whole = torch.where(exact - whole > 0.5, whole + 1, whole)
    plain = quotient_of(a, b)
    whole = torch.where(exact == 0, plain * 0, whole)
    return torch.where(b == 0, plain, whole)


def _cut(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _towards_zero(quotient_of(a, b))


def _towards_zero(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 0, torch.ceil(x), torch.floor(x))


def _fmod(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    rest = a
    for _ in range(3):  # each takes off 23 bits of the quotient
        rest = _rest(rest, _towards_zero(quotient_of(rest, b)), b)
    whole = torch.where(a < 0, -b.abs(), b.abs())
    return torch.where(_opposed(rest, a), rest + whole, rest)


def _remainder(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    rest = _fmod(a, b)
    return torch.where(_opposed(rest, b), rest + b, rest)


# --- which of them ----------------------------------------------------------------------------


def _division(
    of_integers: Function,
    of_floats: Function,
    of_powers: Function | None = None,
    write: bool = False,
) -> Any:
    exact, precise = wrapping(of_integers), _in_float32(of_floats)

    def choose(node: Node) -> Function | None:
        if node.kwargs.keys() - {"other", "rounding_mode"} or dtype_of(node) is torch.float64:
            return None
        divided, by = node.args[0], argument(node, 1, "other")
        function = precise
        if dtype_of(node) in INTEGERS:
            shifts = of_powers is not None and dtype_of(divided) in INTEGERS and _is_power(by)
            function = of_powers if shifts else exact  # type: ignore[assignment]
        node.args, node.kwargs = (divided, by), {}
        return in_place(function) if write else function

    return choose


def _is_power(number: Any) -> bool:
    return isinstance(number, int) and number > 0 and number & (number - 1) == 0


_floor_division = (floor_divide, _floor, shifted)


def _rounded_division(write: bool) -> Any:
    down = _division(*_floor_division, write=write)
    to_zero = _division(truncated_divide, _cut, write=write)

    def choose(node: Node) -> Function | None:
        mode = node.kwargs.get("rounding_mode")
        if mode is None:
            return None if write else _quotient(node)
        return down(node) if mode == "floor" else to_zero(node)  # type: ignore[no-any-return]

    return choose


# What turns a last digit into another whole number, and what passes it on.
_STEPS = frozenset(
    {
        *("floor", "ceil", "trunc", "round", "frac", "int", "long", "fix"),
        *(torch.floor, torch.ceil, torch.trunc, torch.round, torch.frac, torch.fix),
    }
)
_CONVERSIONS = ("to", "type")
_PASS_ON = frozenset(
    {
        *(operator.add, operator.sub, operator.mul, operator.neg, operator.getitem),
        *("view", "reshape", "unsqueeze", "squeeze", "expand", "transpose", "clamp", "float"),
        *(torch.clamp, torch.unsqueeze, torch.squeeze, torch.stack, torch.cat),
    }
)


def _quotient(node: Node) -> Function | None:
    """A quotient that is rounded later. By a power of two it is exact as it is."""
    number = value_of(argument(node, 1, "other"))
    exact = isinstance(number, (int, float)) and number != 0 and abs(math.frexp(number)[0]) == 0.5
    usual = len(node.args) + len(node.kwargs) == 2 and dtype_of(node) in _FLOATS
    if exact or not usual or not any(_is_step(user) for user in _readers(node, 4)):
        return None
    return _in_float32(quotient_of)


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _readers(node: Node, depth: int) -> Iterator[Node]:
    for user in node.users:
        yield user
        if depth and user.target in _PASS_ON:
            yield from _readers(user, depth - 1)


def _is_step(node: Node) -> bool:
    return node.target in _STEPS or (node.target in _CONVERSIONS and dtype_of(node) in INTEGERS)


_TOWARDS_ZERO = "rounds quotients of integers towards zero, and those of floats wrongly"
_ROUNDED = "computed from a quotient that is rounded wrongly, and for integers in float32"

TABLE = (
    Rewrite(
        (operator.floordiv, torch.floor_divide, "floor_divide", "__floordiv__"),
        _division(*_floor_division),
        _TOWARDS_ZERO,
    ),
    Rewrite(
        (operator.ifloordiv, "floor_divide_"),
        _division(*_floor_division, write=True),
        _TOWARDS_ZERO,
    ),
    Rewrite(
        (operator.mod, torch.remainder, "remainder", "__mod__"),
        _division(remainder, _remainder, masked),
        _ROUNDED,
    ),
    Rewrite(
        (operator.imod, "remainder_"), _division(remainder, _remainder, masked, True), _ROUNDED
    ),
    Rewrite((torch.fmod, "fmod"), _division(truncated_remainder, _fmod), _ROUNDED),
    Rewrite((torch.div, "div", torch.divide, "divide"), _rounded_division(False), _TOWARDS_ZERO),
    Rewrite(("div_", "divide_"), _rounded_division(True), _TOWARDS_ZERO),
    Rewrite(
        (operator.truediv, torch.true_divide, "true_divide"),
        _quotient,
        "off by the last digit, which decides how a whole quotient is rounded",
    ),
)
