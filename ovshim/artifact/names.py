"""Names for the inputs and outputs of a graph, as people outside of Python may know them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch.utils._pytree as pytree

from ovshim.plan import Graph
from ovshim.signature import Kind, Structure, unflatten, unflatten_call, with_paths

__all__ = ["names_of"]

IN_RANGE = "in_range"


def names_of(
    kind: Kind, graph: Graph, call: Callable[..., Any]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the tensors of a call, in order, and of what the graph computes of them.

    Args:
        call: the method, for the names of its parameters.
    """
    if graph.names is not None:
        return graph.names
    inputs = _input_names(kind, call)
    leaves = _leaf_names(graph.structure, "output")
    whole = {i: o.computed for i, o in enumerate(graph.outputs) if o.view is None}
    places = {n: leaves[i] for i, n in whole.items() if n is not None}
    outputs = [places.get(n, f"output_{n}") for n in range(len(graph.dtypes))]
    taken = _distinct([*(inputs[i] for i in kind.tensors), *outputs])
    count = len(kind.tensors)
    return tuple(taken[:count]), tuple(taken[count:])


def _input_names(kind: Kind, call: Callable[..., Any]) -> list[str]:
    """The name of every leaf of a call."""
    args, kwargs = unflatten_call(list(range(len(kind.leaves))), kind.structure)
    try:
        bound = inspect.signature(call).bind(*args, **kwargs)
    except (TypeError, ValueError):  # it has no signature
        named = {f"input_{i}": value for i, value in enumerate(args)} | kwargs
    else:
        named = {}
        for name, value in bound.arguments.items():
            variadic = bound.signature.parameters[name].kind
            if variadic is inspect.Parameter.VAR_KEYWORD:
                named.update(value)
            else:
                named[name] = value
    found = [""] * len(kind.leaves)
    for name, value in named.items():
        for path, leaf in with_paths(value):
            found[leaf] = _plain(name + pytree.keystr(path))
    return found


def _leaf_names(structure: Structure, otherwise: str) -> list[str]:
    """The name of every leaf of an output."""
    count = structure.spec.num_leaves + sum(
        len(_leaf_names(sub, otherwise)) - 1 for _, _, sub in structure.nested
    )
    found = [f"{otherwise}_{i}" if count > 1 else otherwise for i in range(count)]
    _name(unflatten(list(range(count)), structure), "", found)
    return found


def _name(value: Any, prefix: str, found: list[str]) -> None:
    """Name the leaves, which are numbers, in a value. What stands in sequences stays nameless."""
    if isinstance(value, dict):
        members = {str(key): inner for key, inner in value.items()}
    elif isinstance(value, list | tuple):
        fields = getattr(value, "_fields", [""] * len(value))
        if len(fields) != len(value) or not all(fields):
            for i, inner in enumerate(value):
                _name(inner, f"{prefix}_{i}" if prefix else "", found)
            return
        members = dict(zip(fields, value, strict=True))
    elif isinstance(value, int):
        if prefix:
            found[value] = _plain(prefix)
        return
    else:
        members = dict(vars(value))
    for name, inner in members.items():
        _name(inner, f"{prefix}_{name}" if prefix else name, found)


def _plain(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_") or "x"


def _distinct(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        other, count = name, 1
        while other in (*found, IN_RANGE):
            count += 1
            other = f"{name}_{count}"
        found.append(other)
    return found
