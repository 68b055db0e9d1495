"""Indices within their tables: what eager refuses must not become a number.

Eager raises for an id beyond the vocabulary; OpenVINO answers with zeros, or fails in a way that
costs the compiled model. So every look-up in a captured graph is given a check of its own: the
index is clamped to the table, and one more output of the graph says whether any had to be. Where
one had, the call goes to eager, which raises the user's usual error.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ovshim.capture.rewrites.entry import INTEGERS, VERDICT

__all__ = ["Checked", "check_ranges"]


class Checked:
    """Runs a graph whose last output says whether its indices were in range.

    Dynamo's bytecode takes the other outputs by their places and must not see this one.

    Attributes:
        in_range: that output of the last run, a boolean tensor; None where nothing is checked.
        outputs: the others of the last run.
    """

    def __init__(self, graph: fx.GraphModule, checked: bool) -> None:
        self._graph = graph
        self._checked = checked
        self.in_range: torch.Tensor | None = None
        self.outputs: Sequence[Any] = ()

    def __call__(self, *args: Any) -> Any:
        # Not by a call: torch would print what the graph raises, with the line of its code.
        outputs = self._graph.forward(*args)
        if self._checked:
            self.in_range = outputs[-1]
            outputs = outputs[:-1]
        self.outputs = outputs
        return outputs


def check_ranges(module: fx.GraphModule) -> Checked:
    """Put a check before every look-up of `module`, in place."""
    graph = module.graph
    verdicts = [node for node in graph.nodes if node.meta.get(VERDICT)]
    for node in list(graph.nodes):
        for argument, index, table, dim, size, negative in _look_ups(node):
            with graph.inserting_before(node):
                limits = (table, dim, size, negative)
                clamped = graph.call_function(_clamped, (index, *limits))
                verdicts.append(graph.call_function(_in_range, (index, clamped, *limits)))
                argument(clamped)
    if verdicts:
        output = next(node for node in graph.nodes if node.op == "output")
        with graph.inserting_before(output):
            verdict = graph.call_function(_all, tuple(verdicts))
        output.args = ((*output.args[0], verdict),)
        module.recompile()
    return Checked(module, bool(verdicts))


def _limits(table: torch.Tensor, dim: int, size: int, negative: bool) -> tuple[Any, Any]:
    # A size that may change is read from the table, where the tracer sees it.
    count = table.shape[dim] if size < 0 else size
    return (-count if negative else 0), count - 1


def _clamped(
    index: torch.Tensor, table: torch.Tensor, dim: int, size: int, negative: bool
) -> torch.Tensor:
    low, high = _limits(table, dim, size, negative)
    lowest = torch.as_tensor(low, dtype=index.dtype)
    return torch.maximum(torch.minimum(index, torch.as_tensor(high, dtype=index.dtype)), lowest)


def _in_range(
    index: torch.Tensor,
    clamped: torch.Tensor,
    table: torch.Tensor,
    dim: int,
    size: int,
    negative: bool,
) -> torch.Tensor:
    fits: torch.Tensor
    if size > 0:  # two operations instead of four, of a microsecond each
        fits = index == clamped
    else:  # nothing is in the range of an empty table, where what is clamped may be what is given
        low, high = _limits(table, dim, size, negative)
        fits = (index >= low) & (index <= high)
    return fits.all()


def _all(first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return torch.stack((first, *others)).all() if others else first


def _size(table: fx.Node, dim: int) -> int | None:
    """The size of the table there; -1 where it may change, None where the table is not known."""
    fake = table.meta.get("example_value")
    if not isinstance(fake, torch.Tensor) or not -fake.dim() <= dim < fake.dim():
        return None
    size: Any = fake.shape[dim]
    return size if isinstance(size, int) else -1


_LookUp = tuple[Callable[[fx.Node], None], fx.Node, fx.Node, int, int, bool]


def _look_ups(node: fx.Node) -> list[_LookUp]:
    """(sets the index, index, table, dimension, its size, whether negatives count from the end)"""
    if node.op not in ("call_function", "call_method"):
        return []
    if node.target is operator.getitem:
        return _subscripts(node)
    if node.target is F.one_hot:
        place = _at(0, "tensor")
        index, classes = _argument(node, *place), _argument(node, 1, "num_classes", -1)
        if not _is_integers(index) or not isinstance(classes, int) or classes < 1:
            return []
        return [(lambda new: _set_argument(node, place, new), index, index, 0, classes, False)]
    known: dict[Any, Any] = _PLACES if node.op == "call_function" else _METHODS
    if node.target not in known:
        return []
    places = known[node.target]
    index, table, dim = (_argument(node, *place) for place in places)
    if not _is_integers(index) or not isinstance(table, fx.Node) or not isinstance(dim, int):
        return []
    size = _size(table, dim)
    if size is None:
        return []
    return [(lambda new: _set_argument(node, places[0], new), index, table, dim, size, False)]


def _subscripts(node: fx.Node) -> list[_LookUp]:
    """Integer tensors among the subscripts of a tensor."""
    table, key = node.args
    if not isinstance(table, fx.Node) or table.meta.get("example_value") is None:
        return []
    fake = table.meta["example_value"]
    keys = key if isinstance(key, tuple) else (key,)
    if not isinstance(fake, torch.Tensor):
        return []
    found: list[_LookUp] = []
    dim = 0
    for n, item in enumerate(keys):
        if item is Ellipsis:
            taken = sum(_dims_taken(other) for other in keys[n + 1 :])
            dim = fake.dim() - taken
            continue
        if _is_integers(item):

            def put(new: fx.Node, n: int = n) -> None:
                held = node.args[1]
                whole = held if isinstance(held, tuple) else (held,)
                changed = (*whole[:n], new, *whole[n + 1 :])
                node.args = (table, changed if isinstance(held, tuple) else changed[0])

            size = _size(table, dim)
            if size is not None:
                found.append((put, item, table, dim, size, True))
        dim += _dims_taken(item)
    return found


def _dims_taken(item: Any) -> int:
    """How many dimensions of the table one subscript speaks of."""
    if item is None or item is Ellipsis:
        return 0
    fake = item.meta.get("example_value") if isinstance(item, fx.Node) else None
    if isinstance(fake, torch.Tensor) and fake.dtype is torch.bool:
        return fake.dim()
    return 1


def _is_integers(value: Any) -> bool:
    fake = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    return isinstance(fake, torch.Tensor) and fake.dtype in INTEGERS


_Place = tuple[int | None, str, Any]


def _argument(node: fx.Node, position: int | None, name: str, default: Any) -> Any:
    if position is not None and position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def _set_argument(node: fx.Node, place: _Place, new: fx.Node) -> None:
    position, name, _ = place
    if position is not None and position < len(node.args):
        node.args = (*node.args[:position], new, *node.args[position + 1 :])
    else:
        node.kwargs = {**node.kwargs, name: new}


def _at(position: int, name: str) -> _Place:
    return position, name, None


# Where index, table and dimension stand among the arguments.
_TABLE_FIRST = ((2, "index", None), (0, "input", None), (1, "dim", None))
_DIMENSION_LAST = ((1, "indices", None), (0, "input", None), (2, "dim", None))
_PLACES: dict[Any, tuple[_Place, _Place, _Place]] = {
    F.embedding: (_at(0, "input"), _at(1, "weight"), (None, "", 0)),
    torch.embedding: (_at(1, "indices"), _at(0, "weight"), (None, "", 0)),
    F.embedding_bag: (_at(0, "input"), _at(1, "weight"), (None, "", 0)),
    torch.gather: _TABLE_FIRST,
    torch.index_select: _TABLE_FIRST,
    torch.scatter: _TABLE_FIRST,
    torch.scatter_add: _TABLE_FIRST,
    torch.index_add: _TABLE_FIRST,
    torch.take_along_dim: _DIMENSION_LAST,
}
_METHODS: dict[Any, tuple[_Place, _Place, _Place]] = {
    "take_along_dim": _DIMENSION_LAST,
    **dict.fromkeys(
        ("gather", "index_select", "scatter", "scatter_", "scatter_add", "scatter_add_"),
        _TABLE_FIRST,
    ),
}
