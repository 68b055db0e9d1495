"""Values at which OpenVINO computes otherwise than eager, asked about inside the graph.

Eager raises where integers are divided by zero, and keeps 64 bits of an integer made of a float;
OpenVINO answers with some number, and saturates at 32 (`overflows` asks about other results of
integers, `nans` and `infinities` about what is no number, `masked_rows` about attention to nothing,
`softmaxes` about such as are written by hand). Which values come there only the graph knows: like
an index out of its table (`ranges`), they make the call go to eager.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ovshim.capture import infinities, masked_rows, nans, overflows, softmaxes
from ovshim.capture.magnitudes import CASTS, magnitude
from ovshim.capture.rewrites.entry import INTEGERS, VERDICT, argument, tensor_of

__all__ = ["check_domains"]

_LARGEST = 2147483647.0
# OpenVINO sums up and compares integers in float32, which tells no more of them apart.
_COUNTED = 2**24

_DIVISIONS = {operator.floordiv, operator.mod, torch.floor_divide, torch.remainder, torch.fmod}
_DIVISION_METHODS = {"floor_divide", "remainder", "fmod", "floor_divide_", "remainder_", "fmod_"}
_ROUNDED = {torch.div, torch.divide, torch.true_divide, "div", "divide", "div_"}
_ELEMENT_BY_ELEMENT = {operator.add, torch.add, torch.min, torch.minimum, torch.max, torch.maximum}
_SCATTERED = ((0, "input"), (1, "mask"), (2, "source"))
_OF_SIZES_ALONE = {torch.full_like, torch.zeros_like, torch.ones_like}


def check_domains(module: fx.GraphModule, owns: Callable[[fx.Node], bool]) -> None:
    """Put such questions beside the operators of `module` that need them, in place.

    Args:
        owns: whether a placeholder is a tensor of the user's module.
    """
    graph = module.graph
    for node in list(graph.nodes):
        magnitude(node)  # in this order, so that none has to ask for a long chain before it
        if _scatters(node):
            _ask(graph, node, _has_enough, *(argument(node, n, name) for n, name in _SCATTERED))
        divisor = _integer_divisor(node)
        if divisor is not None:
            _ask(graph, node, nans.has_no_zero, divisor)
        masked = masked_rows.question(node, owns)
        by_hand = softmaxes.question(node)
        for fits in (overflows.question(node), nans.domain(node), masked, by_hand):
            if fits is not None:
                _ask(graph, node, *fits)
        for made in nans.chosen(node):
            if not any(user.target is nans.is_number for user in made.users):
                _ask(graph, made.next, nans.is_number, made)
        for behind in (nans.lost_infinity(node), infinities.question(node, owns)):
            if behind is not None:
                _ask(graph, node.next, *behind)
        source = _cast_to_integers(node)
        choice = None if source is None else _choice(node)
        if source is not None and choice is not None:
            where, chosen = choice
            _ask(graph, where, _fits_32_bits_where, source, where.args[0], chosen)
        elif source is not None:
            _ask(graph, node, _fits_32_bits, source)


def _ask(graph: fx.Graph, before: fx.Node, question: Any, *about: Any) -> None:
    with graph.inserting_before(before):
        asked = graph.call_function(question, about)
    asked.meta[VERDICT] = True


def _scatters(node: fx.Node) -> bool:
    method = node.op == "call_method" and node.target == "masked_scatter"
    return method or node.target is torch.masked_scatter


def _has_enough(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    whole = torch.logical_or(mask, torch.zeros_like(x, dtype=torch.bool))
    enough = whole.to(torch.int32).sum(dtype=torch.int32) <= source.numel()
    return enough & (whole.numel() < _COUNTED)


def _fits_32_bits(x: torch.Tensor) -> torch.Tensor:
    return (x.abs() <= _LARGEST).all()  # not of a NaN either


def _fits_32_bits_where(x: torch.Tensor, condition: torch.Tensor, chosen: bool) -> torch.Tensor:
    elsewhere = torch.logical_not(condition) if chosen else condition
    return ((x.abs() <= _LARGEST) | elsewhere).all()


def _choice(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """The `torch.where` that takes a value for some elements alone, as relative positions do with a
    logarithm that is infinite at 0, and whether it does where its condition is true. None where the
    value goes elsewhere too."""
    shape = _shape(node)
    while True:
        users = [user for user in node.users if user.target not in _OF_SIZES_ALONE]
        if len(users) != 1 or _shape(users[0]) != shape:
            return None
        (user,) = users
        if user.target is torch.where and len(user.args) == 3 and user.args[0] is not node:
            same = isinstance(user.args[0], fx.Node) and _shape(user.args[0]) == shape
            return (user, user.args[1] is node) if same else None
        if user.target not in _ELEMENT_BY_ELEMENT:
            return None
        node = user


def _shape(node: fx.Node) -> str:
    # As text: to compare sizes that may change would be a guard.
    fake = tensor_of(node)
    return "unknown" if fake is None else str(tuple(fake.shape))


def _integer_divisor(node: fx.Node) -> fx.Node | None:
    divides = node.target in _DIVISIONS or (
        node.op == "call_method" and node.target in _DIVISION_METHODS
    )
    rounds = node.target in _ROUNDED and node.kwargs.get("rounding_mode") is not None
    result = tensor_of(node)
    if not (divides or rounds) or result is None or result.dtype not in INTEGERS:
        return None
    divisor = argument(node, 1, "other")
    return None if tensor_of(divisor) is None else divisor


def _cast_to_integers(node: fx.Node) -> fx.Node | None:
    if node.op != "call_method" or node.target not in CASTS:
        return None
    source, result = node.args[0], tensor_of(node)
    given = tensor_of(source)
    if given is None or result is None or not given.dtype.is_floating_point:
        return None
    wide = result.dtype in (torch.int64, torch.int32)
    return source if wide and isinstance(source, fx.Node) else None
