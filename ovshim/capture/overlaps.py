"""Which outputs of a graph are views of others, for all sizes that it is captured for.

Strides and offsets of an example would tell it for the example alone: `x[:, 1]` and `x[:, n // 2]`
may begin at one place. In Dynamo's graph they are expressions over the sizes.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ovshim.capture.rewrites.entry import value_of
from ovshim.views import Part, View, Views

if TYPE_CHECKING:
    from ovshim.capture import Request
    from ovshim.capture.ranges import Checked

__all__ = ["Overlaps"]

# Of more dimensions there would be thousands of ways to look through.
_MOST_DIMENSIONS = 6

_Taken = tuple[tuple[Part, ...], tuple[int, ...]]


class Overlaps:
    """The outputs of Dynamo's graph, as it gave it, where some of the module's overlap."""

    def __init__(self, graph: fx.GraphModule, request: Request) -> None:
        self._pairs = request.overlaps
        # Now and not when they are asked for: nobody may look at symbols while a graph is traced.
        self._views = _views_in(graph) if self._pairs else {}
        _keep_apart(graph)

    def views_among(self, checked: Checked, leaves: Sequence[Any]) -> Views:
        """Which of the leaves that overlap are views of others, as far as that is certain.

        Args:
            checked: what has just computed them.
        """
        outputs, checked.outputs = checked.outputs, ()
        computed = {id(tensor): n for n, tensor in enumerate(outputs)}
        met = Counter(map(id, leaves))
        found: dict[int, View] = {}
        for group in _groups(self._pairs):
            # What is one object has to stay one.
            if all(met[id(leaves[i])] == 1 for i in group):
                places = {i: computed.get(id(leaves[i]), -1) for i in group}
                found.update(self._of_one(places))
        return found

    def _of_one(self, places: Mapping[int, int]) -> Views:
        """How all of these leaves, by their places among the graph's outputs, are views of one."""
        for base, place in places.items():
            views = {i: self._views.get((n, place)) for i, n in places.items() if n != place}
            known = {i: (base, *view) for i, view in views.items() if view is not None}
            if len(known) == len(places) - 1:
                return {i: View(*view) for i, view in known.items()}
        return {}


def _views_in(graph: fx.GraphModule) -> dict[tuple[int, int], _Taken]:
    """How outputs of a graph are views of others that come before them, by both their places."""
    order = {node: n for n, node in enumerate(graph.graph.nodes)}
    outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    known = [(i, node) for i, node in enumerate(outputs) if isinstance(node, fx.Node)]
    found = {}
    for (i, view), (j, whole) in itertools.permutations(known, 2):
        if order[whole] < order[view]:
            taken = _taken(value_of(view), value_of(whole))
            if taken is not None:
                found[i, j] = taken
    return found


def _keep_apart(graph: fx.GraphModule) -> None:
    """Guard that outputs that lie beside each other in one memory do, as the first token and the
    last of more than one."""
    nodes = [node for node in graph.graph.nodes if _has_strides(value_of(node))]
    outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    known = dict.fromkeys(node for node in outputs if node in nodes)
    for one, other in itertools.combinations(map(value_of, known), 2):
        if not _is_shared(one, other):
            continue
        for whole in map(value_of, nodes):
            taken = _taken(one, whole), _taken(other, whole)
            if taken[0] is not None and taken[1] is not None:
                _guard_apart(whole.shape, taken[0][0], taken[1][0])
                break


def _has_strides(fake: Any) -> bool:
    return isinstance(fake, torch.Tensor) and fake.layout is torch.strided


def _guard_apart(sizes: Sequence[Any], one: Sequence[Part], other: Sequence[Part]) -> None:
    """Guard that these parts have nothing in common, unless they do in the example."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    ways = []
    for size, part, its in zip(sizes, one, other, strict=True):
        (start, stop), (from_, to) = _ends(part, size), _ends(its, size)
        ways += [stop <= from_, to <= start]
    if not any(map(statically_known_true, ways)):
        next((way for way in ways if _holds(way) and bool(way)), None)


def _holds(condition: Any) -> bool:
    """Whether a condition does in the example, without a guard on that."""
    return bool(condition.node.hint if isinstance(condition, torch.SymBool) else condition)


def _ends(part: Part, size: Any) -> tuple[Any, Any]:
    """Where a part of a dimension begins and ends."""
    first, last = (part, part + 1 or None) if isinstance(part, int) else part
    start = first if first >= 0 else size + first
    return start, size if last is None else last if last >= 0 else size + last


def _groups(pairs: Sequence[tuple[int, int]]) -> list[set[int]]:
    """Leaves that overlap, directly or by way of others."""
    groups: list[set[int]] = []
    for pair in pairs:
        touched = [group for group in groups if group & set(pair)]
        groups = [group for group in groups if group not in touched]
        groups.append(set(pair).union(*touched))
    return groups


def _taken(view: Any, whole: Any) -> _Taken | None:
    """How a fake tensor is taken of another one; None where it is not, or nobody knows."""
    if not isinstance(view, torch.Tensor) or not isinstance(whole, torch.Tensor):
        return None
    if view.dtype != whole.dtype or not _is_shared(view, whole) or whole.dim() > _MOST_DIMENSIONS:
        return None
    sizes, strides = _expressions(whole.shape), _expressions(whole.stride())
    if not _is_dense(sizes, strides):
        return None  # one place of its memory would be several of its own
    offset = _expression(view.storage_offset()) - _expression(whole.storage_offset())
    left, taken = _expressions(view.shape), _expressions(view.stride())
    for order in itertools.permutations(range(whole.dim()), view.dim()):
        if all(_same(strides[d], stride) for d, stride in zip(order, taken, strict=True)):
            lengths = dict(zip(order, left, strict=True))
            for starts in _starts(offset, sizes, strides):
                parts = [_part(n, starts[d], lengths.get(d)) for d, n in enumerate(whole.shape)]
                if all(part is not None for part in parts):
                    rank = {d: n for n, d in enumerate(sorted(order))}
                    ranks = tuple(rank[d] for d in order)
                    return tuple(p for p in parts if p is not None), ranks
    return None


def _starts(offset: Any, sizes: Sequence[Any], strides: Sequence[Any]) -> Iterator[tuple[int, ...]]:
    """Where a view may begin that begins so far behind the whole: in no dimension elsewhere, or in
    one. What counts from the end of one is negative."""
    import sympy

    none = (0,) * len(sizes)
    if _same(offset, 0):
        yield none
        return
    for d, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        start, behind = sympy.cancel(offset / stride), sympy.cancel(size - offset / stride)
        if start.is_Integer and start > 0 and not (size.is_Integer and start >= size):
            yield (*none[:d], int(start), *none[d + 1 :])
        elif behind.is_Integer and behind > 0:
            yield (*none[:d], -int(behind), *none[d + 1 :])


def _part(size: Any, start: int, length: Any) -> Part | None:
    """What is taken of a dimension, if so much of it is left; `length` is None where it is not."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if length is None:
        return start
    if start < 0:
        behind, fits = -start - length, statically_known_true(size >= -start)
    elif length.is_Integer:
        stop = start + int(length)
        return (start, stop) if statically_known_true(size >= stop) else None
    else:
        behind, fits = _expression(size) - length - start, True
    if not fits or not behind.is_Integer or behind < 0:
        return None
    return start, -int(behind) or None


def _is_shared(one: torch.Tensor, other: torch.Tensor) -> bool:
    places = [tensor.untyped_storage()._cdata for tensor in (one, other)]
    return bool(places[0] == places[1])


def _is_dense(sizes: Sequence[Any], strides: Sequence[Any]) -> bool:
    """Whether no two elements lie at one place, as they surely do not where nothing lies between
    them."""
    left = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    step: Any = 1
    while left:
        following = [pair for pair in left if _same(pair[1], step)]
        if len(following) != 1:
            return False
        left.remove(following[0])
        step = step * following[0][0]
    return True


def _same(one: Any, other: Any) -> bool:
    import sympy

    return bool(sympy.expand(one - other) == 0)


def _expressions(numbers: Sequence[Any]) -> list[Any]:
    return [_expression(number) for number in numbers]


def _expression(number: Any) -> Any:
    import sympy

    return number.node.expr if isinstance(number, torch.SymInt) else sympy.Integer(number)
