"""What a graph of Dynamo's takes, and a module that holds its weights and takes the rest."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

__all__ = ["Layout", "frozen_module"]

# What Dynamo writes for arithmetic on sizes, and does not read itself.
_OF_NUMBERS: dict[Any, Callable[..., Any]] = {
    torch.sym_sum: sum,
    torch.sym_max: max,
    torch.sym_min: min,
    torch.sym_int: int,
    torch.sym_float: float,
    torch.sym_not: operator.not_,
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the inputs of a graph are, by position; `of` finds it out.

    Attributes:
        static: weights, buffers and tensor attributes.
        given: what a frozen graph takes: tensors, and numbers that are no tensor's size.
        floats: those of `given` that come as tensors, although they are Python's numbers.
        sizes: inputs that are the size of a dimension of another one.
        dynamic: for each of `given`, the dimensions that may change.
    """

    static: tuple[int, ...]
    given: tuple[int, ...]
    floats: frozenset[int]
    sizes: Mapping[int, tuple[int, int]]
    dynamic: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(graph: fx.GraphModule) -> Layout:
        nodes = graph.graph.find_nodes(op="placeholder")
        static = [i for i, node in enumerate(nodes) if _is_static(node)]
        examples = [node.meta.get("example_value") for node in nodes]
        sizes: dict[int, tuple[int, int]] = {}
        for i, symbol in enumerate(examples):
            if isinstance(symbol, torch.SymInt):
                place = _place_of(symbol, examples)
                if place is not None:
                    sizes[i] = place
        given = [i for i in range(len(nodes)) if i not in static and i not in sizes]
        return Layout(
            static=tuple(static),
            given=tuple(given),
            floats=frozenset(i for i in given if _is_number(nodes[i])),
            sizes=sizes,
            dynamic=tuple(_open_dims(examples[i]) for i in given),
        )


def _is_static(node: fx.Node) -> bool:
    return "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})


def _is_number(node: fx.Node) -> bool:
    """Whether it is a float of Python's: Dynamo makes a tensor of one that changes, and has the
    graph take the number out again."""
    fake = node.meta.get("example_value")
    return (
        isinstance(fake, torch.Tensor)
        and fake.dim() == 0
        and fake.dtype is torch.float64
        and bool(node.users)
        and all(user.op == "call_method" and user.target == "item" for user in node.users)
    )


def _place_of(symbol: torch.SymInt, examples: Sequence[Any]) -> tuple[int, int] | None:
    for i, other in enumerate(examples):
        if isinstance(other, torch.Tensor):
            sizes: list[Any] = list(other.shape)
            for d, size in enumerate(sizes):
                if isinstance(size, torch.SymInt) and size.node.expr == symbol.node.expr:
                    return i, d
    return None


def _open_dims(example: Any) -> tuple[int, ...]:
    if not isinstance(example, torch.Tensor):
        return ()
    sizes: list[Any] = list(example.shape)
    return tuple(d for d, size in enumerate(sizes) if _is_open(size))


def _is_open(size: Any) -> bool:
    """Not a symbol that turned out to have but one value."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def frozen_module(
    graph: fx.GraphModule, layout: Layout, statics: Sequence[torch.Tensor]
) -> fx.GraphModule:
    """A module that holds these weights and takes the other inputs.

    They are aliases: the weights themselves may go, and take all of this along. An alias shares
    memory and the count of versions.
    """
    nodes = graph.graph.find_nodes(op="placeholder")
    copied = fx.Graph()
    at: dict[fx.Node, Any] = {}
    held: dict[str, Any] = {}
    for i in layout.given:
        at[nodes[i]] = copied.placeholder(nodes[i].name)
    for i, (place, d) in layout.sizes.items():
        if place not in layout.static:
            at[nodes[i]] = copied.call_method("size", (at[nodes[place]], d))
    with torch.inference_mode(False), torch.no_grad():
        for i, tensor in zip(layout.static, statics, strict=True):
            name, alias = nodes[i].name, tensor.detach()
            is_parameter = isinstance(tensor, nn.Parameter)
            held[name] = nn.Parameter(alias, requires_grad=False) if is_parameter else alias
            at[nodes[i]] = copied.get_attr(name)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "call_method" and node.target == "item" and _reads_number(node):
            at[node] = at[node.args[0]]
            continue
        if node.op in ("get_attr", "call_module"):
            held[node.target] = attrgetter(node.target)(graph)
        at[node] = copied.node_copy(node, lambda old: at[old])
        at[node].meta = {}
        if node.target in _OF_NUMBERS:
            at[node].target = _OF_NUMBERS[node.target]
        _leave_out_empty(node, at[node])
    return fx.GraphModule(held, copied).eval()


def _leave_out_empty(node: fx.Node, copied: fx.Node) -> None:
    """A cache of keys begins with `torch.cat([torch.tensor([]), keys])`: torch passes over tensors
    of that one shape, and OpenVINO does not take them."""
    if node.target is not torch.cat or not isinstance(node.args[0], (list, tuple)):
        return
    fakes = [part.meta.get("example_value") for part in node.args[0] if isinstance(part, fx.Node)]
    known = [fake for fake in fakes if isinstance(fake, torch.Tensor)]
    full = [i for i, fake in enumerate(known) if tuple(fake.shape) != (0,)]
    same = len(known) == len(node.args[0]) and len({fake.dtype for fake in known}) == 1
    if full and same and len(full) < len(known):
        parts: Any = copied.args[0]
        copied.args = ([parts[i] for i in full], *copied.args[1:])


def _reads_number(node: fx.Node) -> bool:
    source = node.args[0]
    return isinstance(source, fx.Node) and source.op == "placeholder" and _is_number(source)
