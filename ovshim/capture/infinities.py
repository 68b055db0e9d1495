"""Infinities that finite inputs grow to, exponentials and logarithms, and that become NaN where two
of them meet, or one meets 0: asked about inside the graph where something behind loses the NaN.

Asked is the result of the first operator that mixes them with something else, and of exponentials
whether it is finite: what grows beyond that is eager's. (About softmaxes by hand `softmaxes`
asks.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from ovshim.capture.magnitudes import is_of_floats, name_of
from ovshim.capture.nans import (
    LOGARITHMS,
    is_infinite,
    is_lost,
    is_not_below,
    is_number,
    names,
)
from ovshim.capture.rewrites.entry import argument
from ovshim.capture.rewrites.exponentials import EXPONENTIALS
from ovshim.capture.softmaxes import DIVIDE, MAXIMA, SUBTRACT

__all__ = ["question"]

_GROW = EXPONENTIALS | {"expm1", "expm1_", "special_expm1", "exp2", "exp2_", "sinh", "cosh"}
# Infinite at an end of their domains.
_ENDS = LOGARITHMS | names("log1p log1p_ special_log1p logit logit_ special_logit atanh arctanh")
_SUMS = SUBTRACT | names("rsub add add_ iadd")
_MIX = names(
    "mul mul_ imul multiply matmul bmm baddbmm addmm einsum linear conv1d conv2d conv3d layer_norm"
    " group_norm batch_norm instance_norm rms_norm cosine_similarity var std cumsum lerp addcmul"
)
# They lose a NaN that they make themselves of what they are given.
_NORMALIZE = names("softmax log_softmax softmin normalize logsumexp cross_entropy")
_FILL = names("where masked_fill masked_fill_")
# Operators that carry an infinity.
_CARRY = names(
    "view reshape unsqueeze squeeze expand transpose permute flatten contiguous clone to float neg"
    " getitem mul add sub truediv div sum mean repeat cat stack sqrt square"
)
_DEPTH = 6
# Below the logarithm of the largest float32, 88.7.
_SMALL = 80


def question(node: fx.Node, owns: Callable[[fx.Node], bool]) -> tuple[Any, ...] | None:
    """A function that tells, behind `node`, whether a NaN may have come up in it, and what to give
    it; None where there is nothing to ask.

    Args:
        owns: whether a placeholder is a tensor of the user's module.
    """
    name = name_of(node)
    grows = functools.partial(_grows, owns=owns)
    if not is_of_floats(node):
        return None
    if name in _FILL:
        filled = any(isinstance(x, float) and math.isnan(x) for x in _constants(node))
        return (is_number, node) if filled and is_lost(node) else None
    if name in _NORMALIZE:
        given = argument(node, 0, "input")
        return (_is_finite, given) if grows(given) else None
    several = len(node.all_input_nodes) > 1
    if name in _SUMS | DIVIDE and several and is_lost(node):
        operands = node.args[:2]
        if any(map(grows, operands)):
            return (_is_finite, node) if name in _SUMS else (is_number, node)
        return (is_number, node) if all(map(_has_an_end, operands)) else None
    if name not in _MIX or not is_lost(node):
        return None
    given = node.all_input_nodes
    if any(map(grows, given)):
        return _is_finite, node
    ends = any(_has_an_end(x, LOGARITHMS) for x in given)  # of products of logarithms `nans` asks
    return (is_number, node) if ends else None


def _constants(node: fx.Node) -> Iterator[Any]:
    for held in (*node.args, *node.kwargs.values()):
        yield held
        if isinstance(held, fx.Node) and name_of(held) in ("full", "tensor", "full_like"):
            yield from held.args


def _grows(x: Any, owns: Callable[[fx.Node], bool]) -> bool:
    """Whether an exponential that may overflow is carried here."""
    found = (one for one in _carried(x, _DEPTH) if name_of(one) in _GROW)
    return any(not _is_limited(one) and not _is_of_weights(one, owns) for one in found)


def _is_of_weights(node: fx.Node, owns: Callable[[fx.Node], bool]) -> bool:
    """Whether it is computed of a weight alone, as the scale of logits is."""
    given = argument(node, 0, "input")
    while isinstance(given, fx.Node) and name_of(given) in _CARRY and len(given.args) == 1:
        given = given.args[0]
    return isinstance(given, fx.Node) and (given.op == "get_attr" or owns(given))


def _has_an_end(x: Any, but: frozenset[str] = frozenset()) -> bool:
    """Whether what is infinite at one end of its domain is carried here, or an infinite constant;
    operators of the names in `but` left out."""
    found = (one for one in _carried(x, _DEPTH) if name_of(one) not in but)
    return any(name_of(one) in _ENDS or is_infinite(one) for one in found)


def _carried(x: Any, depth: int) -> Iterator[fx.Node]:
    """What gives `x` its infinities; not past a mixture, about which is asked itself."""
    if not isinstance(x, fx.Node):
        return
    yield x
    mixed = len(x.all_input_nodes) > 1 and name_of(x) in _MIX | _SUMS | DIVIDE
    if depth and name_of(x) in _CARRY and not mixed:
        # A number that is divided by what grows goes to 0.
        divided = name_of(x) in DIVIDE and not isinstance(x.args[0], fx.Node)
        for given in () if divided else x.all_input_nodes:
            yield from _carried(given, depth - 1)


def _is_limited(node: fx.Node) -> bool:
    """Whether the exponent is known to be small: limited, below 0, less than the largest."""
    x = argument(node, 0, "input")
    if not isinstance(x, fx.Node):
        return False
    name = name_of(x)
    if name in ("clamp", "clamp_", "clamp_max", "hardtanh", "clip"):
        high = argument(x, 1 if name == "clamp_max" else 2, "max")
        return isinstance(high, (int, float)) and high <= _SMALL
    if name in ("log_softmax", "logsigmoid", "tanh", "sigmoid"):
        return True
    if name == "neg" or (name in ("mul", "truediv") and any(map(_is_negative, x.args))):
        return all(is_not_below(y) for y in x.args if isinstance(y, fx.Node))
    subtracted = _carried(argument(x, 1, "other"), _DEPTH) if name in SUBTRACT else ()
    whole = argument(x, 0, "input")
    return any(name_of(one) in MAXIMA and argument(one, 0, "input") is whole for one in subtracted)


def _is_negative(x: Any) -> bool:
    return isinstance(x, (int, float)) and x < 0


def _is_finite(x: torch.Tensor) -> torch.Tensor:
    return (x.abs() <= torch.finfo(x.dtype).max).all()
