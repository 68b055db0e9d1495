"""Assertions of what tensors hold, as `torch._check` makes them: eager raises where one fails.

In Dynamo's graph a number is taken out of a tensor for each. Of a graph that does nothing else with
it, the number is left out and the tensor is asked about instead: where it does not hold what the
module asserts, the call goes to eager, which raises.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from ovshim.capture.rewrites.entry import VERDICT, tensor_of

__all__ = ["are_asked", "ask_instead"]

_ASSERT = torch.ops.aten._assert_scalar.default
_OF_NUMBERS: dict[Any, Callable[..., Any]] = {
    torch.sym_ite: lambda condition, one, other: one if condition else other,
    operator.ge: operator.ge,
    operator.le: operator.le,
    operator.eq: operator.eq,
}


def ask_instead(module: fx.GraphModule) -> frozenset[Any]:
    """Replace such assertions of booleans in a graph, in place. Returns the symbols of those."""
    graph = module.graph
    asked: set[Any] = set()
    for node in list(graph.nodes):
        if node.op != "call_method" or node.target != "item":
            continue
        fake, number = tensor_of(node.args[0]), node.meta.get("example_value")
        if fake is None or fake.dtype is not torch.bool or not isinstance(number, torch.SymBool):
            continue
        users = _asserting(node)
        if users is None:
            continue
        with graph.inserting_before(node):
            question = graph.call_function(_holds, (node.args[0],))
        question.meta[VERDICT] = True
        for user in (*reversed(users), node):
            graph.erase_node(user)
        # By now it is known to be true, for it is asserted: this is what it was before.
        asked |= number.node._expr.free_symbols
    return frozenset(asked)


def are_asked(deferred: Mapping[Any, Iterable[Any]], symbols: frozenset[Any]) -> bool:
    """Whether all that Dynamo would check while a graph runs is about these symbols alone."""
    return all(one.expr.free_symbols <= symbols for each in deferred.values() for one in each)


def _holds(x: torch.Tensor) -> torch.Tensor:
    return x.all()


def _asserting(item: fx.Node) -> list[fx.Node] | None:
    """What is made of a number, in order, if all of it is asserted, the number itself among it, and
    true where that is; else None."""
    values: dict[fx.Node, Any] = {item: True}
    asserted = False
    for node in item.graph.nodes:
        if not any(given in values for given in node.all_input_nodes):
            continue
        if not all(given in values for given in node.all_input_nodes) or node.kwargs:
            return None
        if node.target is _ASSERT:
            asserted = asserted or node.args[0] is item
            if values[node.args[0]] is not True:
                return None
            values[node] = None
        elif node.target in _OF_NUMBERS:
            values[node] = _OF_NUMBERS[node.target](*(values.get(x, x) for x in node.args))
        else:
            return None
    return [node for node in values if node is not item] if asserted else None
