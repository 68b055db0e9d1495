"""Exact replacements, on Dynamo's graph, of what would come out of OpenVINO wrong or not at all.

    sizes       Python's functions of sizes, which a trace would bake in
    attention   rows of a mask that hide everything
    division    quotients, how they are rounded
    integers    types that wrap, numbers beyond float32
    exponentials  and logarithms next to 1
    operators   arguments that are ignored, ties, edges
    missing     operators that OpenVINO has no counterpart for
    products    sums of products among them
    bags        padding in bags of embeddings
    nearest     interpolation where sizes may change
    losses      losses
    layout      ways to arrange elements

Each is an entry of `TABLE`: a small function, the reason for it, and the version of OpenVINO from
which it may be dropped. Every replacement gives what eager gives, dtype included, for all values
and all sizes; where there is none that does, the operator is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch.fx import GraphModule, Node

from ovshim.capture.rewrites import (
    attention,
    bags,
    division,
    exponentials,
    integers,
    layout,
    losses,
    missing,
    moments,
    nearest,
    operators,
    products,
    sizes,
)
from ovshim.capture.rewrites.entry import VERDICT, Rewrite, Target

__all__ = ["SIZES", "TABLE", "Rewrite", "apply"]

# For numbers that depend on sizes, and for everything else.
SIZES = sizes.TABLE
_ROOMS = (
    attention,
    division,
    integers,
    exponentials,
    operators,
    missing,
    products,
    bags,
    losses,
    layout,
    nearest,
    moments,
)
TABLE = tuple(entry for room in _ROOMS for entry in room.TABLE)

_Index = Mapping[Target, Sequence[Rewrite]]


def apply(graph: GraphModule) -> None:
    """Rewrite a graph of Dynamo's in place. To be called before its guards on sizes are read: what
    must not change any more is among them afterwards.

    Raises:
        CaptureError: OpenVINO gives something else than eager, and there is no replacement.
    """
    of_sizes, of_tensors = _index(SIZES), _index(TABLE)
    for module in graph.modules():
        if isinstance(module, GraphModule):
            for node in list(module.graph.nodes):
                if node.op in ("call_function", "call_method"):
                    _rewrite(node, of_sizes, of_tensors)
            module.recompile()


def _index(table: Iterable[Rewrite]) -> _Index:
    entries: dict[Target, list[Rewrite]] = {}
    for entry in table:
        for target in entry.targets:
            entries.setdefault(target, []).append(entry)
    return entries


def _rewrite(node: Node, of_sizes: _Index, of_tensors: _Index) -> None:
    if sizes.is_assertion(node):
        sizes.check_assertion(node)
    elif sizes.is_size(node):
        if not sizes.stays_right(node) and not _replaced(node, of_sizes):
            sizes.fix(node)
    elif VERDICT not in node.meta:  # a question is ours, and takes what it is about
        for given in node.all_input_nodes:
            if not sizes.takes(node, given):
                sizes.fix(given)
        _replaced(node, of_tensors)


def _replaced(node: Node, index: _Index) -> bool:
    entries = index.get(node.target, ())
    if entries and not node.args and "input" in node.kwargs:
        given = dict(node.kwargs)
        node.args, node.kwargs = (given.pop("input"),), given
    for entry in entries:
        function = entry.function(node)
        if function is not None:
            node.op, node.target = "call_function", function
            return True
    return False
