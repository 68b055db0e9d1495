"""Sizes as Python numbers.

While a graph is traced, sizes are 0-d tensors. Functions of Python's on them (a square root, the
smaller one of two) would bake the example's value in, and so would operators that take a plain
number. So functions on sizes are replaced by such as take tensors, and what no replacement carries
through is *fixed*: its value becomes a guard of the graph.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    statically_known_true,
)

from ovshim.capture import CaptureError
from ovshim.capture.rewrites import division
from ovshim.capture.rewrites.entry import Function, Rewrite, always, value_of
from ovshim.reasons import reason

__all__ = ["TABLE", "check_assertion", "fix", "is_assertion", "is_size", "stays_right", "takes"]

log = logging.getLogger("ovshim")

Number = int | float | torch.Tensor


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operators that do the same to a 0-d tensor, and stay right in OpenVINO.
_RIGHT = frozenset(
    {
        *(operator.add, operator.sub, operator.neg, operator.abs, operator.truediv),
        *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
        *(operator.getitem, "size", "numel", "dim"),
    }
)
# What takes an integer that is a 0-d tensor while it is traced, and what takes such a float.
_TAKE_FLOATS = _names(
    "add sub mul truediv div pow iadd isub imul itruediv add_ sub_ mul_ div_ rsub eq ne lt le gt ge"
    " full new_full full_like masked_fill masked_fill_ where clamp clamp_ clamp_min clamp_max fill_"
    " lerp addcmul addcdiv leaky_relu elu arange scalar_tensor tensor fmod remainder floordiv mod"
    " floor_divide"
    " output"
)
_TAKE_INTEGERS = _TAKE_FLOATS | _names(
    "getitem setitem zeros ones empty eye new_zeros new_ones new_empty view reshape expand repeat"
    " repeat_interleave narrow unflatten unfold as_strided chunk topk pad interpolate broadcast_to"
    " tile tril triu diagonal tril_indices triu_indices one_hot bincount isin select layer_norm"
    " rms_norm Size"
)


def is_size(node: Node) -> bool:
    """Whether a node computes a number that depends on sizes."""
    return isinstance(value_of(node), (torch.SymInt, torch.SymFloat, torch.SymBool))


def stays_right(node: Node) -> bool:
    """Whether such a node is right as it is."""
    large = any(isinstance(x, int) and abs(x) >= 2**24 for x in node.args)
    return node.target in _RIGHT and not large


def takes(node: Node, given: Node) -> bool:
    """Whether a size may go into this operator."""
    value = value_of(given)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if isinstance(value, torch.SymInt):
        return name in _TAKE_INTEGERS
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return name in _TAKE_FLOATS
    return True


def fix(node: Node) -> None:
    """Guard that a number that depends on sizes stays the one it is in the example.

    A baked value could go unseen in the proof: `int(n * 0.01)` is 0 for many a size.

    Raises:
        CaptureError: it depends on values, not on sizes of inputs: of that there is no guard.
    """
    value = value_of(node)
    log.debug("%s of %s is fixed", node.target, value)
    try:
        if isinstance(value, torch.SymInt):
            int(value)
        elif isinstance(value, torch.SymFloat):
            float(value)
        elif isinstance(value, torch.SymBool):
            bool(value)
    except GuardOnDataDependentSymNode as error:
        raise CaptureError(reason("value-dependent", f"{node.target} of {value}")) from error


def is_assertion(node: Node) -> bool:
    return node.target is torch.ops.aten._assert_scalar.default


def check_assertion(node: Node) -> None:
    """Drop an assertion of Dynamo's: what cannot fail as it is, what depends on sizes by a guard.
    While a graph is traced it would compare tensors."""
    condition = node.args[0]
    if isinstance(condition, Node) and not statically_known_true(value_of(condition)):
        fix(condition)
    node.graph.erase_node(node)


def smaller(a: Number, b: Number) -> Number:
    """`min` of two sizes."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.minimum(a, b)
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        tensor, number = (a, b) if isinstance(a, torch.Tensor) else (b, a)
        return tensor.clamp(max=number)  # type: ignore[union-attr]
    return min(a, b)


def larger(a: Number, b: Number) -> Number:
    """`max` of two sizes."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.maximum(a, b)
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        tensor, number = (a, b) if isinstance(a, torch.Tensor) else (b, a)
        return tensor.clamp(min=number)  # type: ignore[union-attr]
    return max(a, b)


def total(sizes: tuple[Number, ...]) -> Number:
    """The sum of several sizes."""
    return sum(sizes[1:], start=sizes[0])


def as_float(size: Number) -> Number:
    """`float` of a size. A 0-d tensor of the default dtype mixes with tensors as a number does."""
    return size.to(torch.get_default_dtype()) if isinstance(size, torch.Tensor) else float(size)


def _of_sizes(name: str) -> Callable[[Number], Number]:
    """A function of `math`'s for sizes."""
    of_numbers, of_tensors = getattr(math, name), getattr(torch, name)

    def function(size: Number) -> Number:
        is_tensor = isinstance(size, torch.Tensor)
        return of_tensors(as_float(size)) if is_tensor else of_numbers(size)  # type: ignore[no-any-return]

    return function


_NAMES = ("sqrt", "log2", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh")
_FUNCTIONS = {getattr(torch, f"_sym_{name}"): _of_sizes(name) for name in _NAMES}


def power(base: Number, exponent: Number) -> Number:
    """`base ** exponent` where one is a size and the result a float."""
    return as_float(base) ** exponent


def square(size: Number) -> Number:
    """`size ** 2`. OpenVINO would compute the power in float32: wrong from 4097 up."""
    return size * size


def floor_division(a: Number, b: Number) -> Number:
    """`a // b` of integers."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return division.floor_divide(a, b)  # type: ignore[no-any-return]
    return a // b


def modulo(a: Number, b: Number) -> Number:
    """`a % b` of integers."""
    return a - floor_division(a, b) * b


def ceiling_division(a: Number, b: Number) -> Number:
    """`math.ceil(a / b)` of integers."""
    return -floor_division(-a, b)


def truncated_division(a: Number, b: Number) -> Number:
    """`int(a / b)` of integers."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return division.truncated_divide(a, b)  # type: ignore[no-any-return]
    return int(a / b)


def rounded_division(a: Number, b: Number) -> Number:
    """`round(a / b)` of integers, b > 0: halves go to the even one."""
    below = floor_division(a, b)
    twice = (a - below * b) * 2
    up = (twice > b) | ((twice == b) & (below % 2 == 1))
    return below + (up.to(torch.int64) if isinstance(up, torch.Tensor) else int(up))


def _power(node: Node) -> Function | None:
    if isinstance(value_of(node), torch.SymFloat):
        return power
    if node.args[1] == 2:
        node.args = node.args[:1]
        return square
    return None


def _product(node: Node) -> Function | None:
    """OpenVINO computes in int32: a size times a large number is not carried through."""
    large = any(isinstance(x, int) and abs(x) >= 2**16 for x in node.args)
    return None if large else operator.mul


def _division(function: Callable[..., Any]) -> Callable[[Node], Function | None]:
    """Round a quotient in integers: in float32 it would be wrong from 2**24 up, and in bfloat16
    from 257 up."""

    def divided(node: Node) -> Function | None:
        parts = _quotient(node.args[0]) if len(node.args) == 1 and not node.kwargs else None
        if parts is None:
            return None
        node.args = parts
        return function

    return divided


def _quotient(node: Any) -> tuple[Any, int] | None:
    """What is divided by what in a node that is `size / number` or `size * number`, as integers;
    None where that is not exact."""
    if not isinstance(node, Node) or node.target not in (operator.truediv, operator.mul):
        return None
    size, number = node.args
    if not isinstance(size, Node):
        size, number = number, size
        if node.target is operator.truediv:
            return None
    if not isinstance(value_of(size), torch.SymInt) or not isinstance(number, (int, float)):
        return None
    if not (number > 0 and math.isfinite(number)):
        return None
    over, under = number.as_integer_ratio()
    if node.target is operator.truediv:
        over, under = under, over
    if max(over, under) > 1024:
        return None
    if over != 1:
        with node.graph.inserting_before(node):
            product = node.graph.call_function(operator.mul, (size, over))
        product.meta["example_value"] = value_of(size) * over
        size = product
    return size, under


TABLE = (
    Rewrite((torch.ops.aten.sym_size.int,), always(torch.Tensor.size), "is a number in a trace"),
    Rewrite((torch.sym_min,), always(smaller), "asserts that it is not given a tensor"),
    Rewrite((torch.sym_max,), always(larger), "asserts that it is not given a tensor"),
    Rewrite((torch.sym_sum,), always(total), "is not defined for tensors"),
    Rewrite((torch.sym_float,), always(as_float), "bakes the example's size in"),
    Rewrite(tuple(_FUNCTIONS), lambda node: _FUNCTIONS[node.target], "bakes the size in"),
    Rewrite((operator.pow,), _power, "OpenVINO computes powers of integers in float32"),
    Rewrite((operator.mul,), _product, "OpenVINO computes in int32"),
    Rewrite((operator.floordiv,), always(floor_division), "OpenVINO rounds towards zero"),
    Rewrite((operator.mod,), always(modulo), "OpenVINO computes it in float32"),
    Rewrite((math.floor,), _division(floor_division), "bakes the example's size in"),
    Rewrite((math.ceil,), _division(ceiling_division), "bakes the example's size in"),
    Rewrite((math.trunc, torch.sym_int), _division(truncated_division), "bakes the size in"),
    Rewrite(("__round__",), _division(rounded_division), "bakes the example's size in"),
)
