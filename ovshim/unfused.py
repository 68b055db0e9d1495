"""Graphs over which OpenVINO 2026.4 ends the process, and how they are compiled all the same.

Where sizes are known, be it behind a mean over an open one, the CPU plugin makes one kernel of
linear layers that follow one another (of tensors of two dimensions at most). If what comes of them
meets the result of other elementwise operations, as in two residual blocks of a multilayer
perceptron, it reads through a null pointer while it compiles (few rows for each thread; seen on a
Xeon of family 6, model 207). Without that kind of kernel it compiles. A graph of 8 to 16 µs then
takes 1 to 4 µs longer, so the others keep them. Other devices that hand on to a CPU do not hand on
the property.

And where an index is known to have no elements, as `torch.arange(length - 1)` of a length of 1, the
CPU plugin divides by zero while it compiles. Of a product or a sum over no elements, which is 0, it
leaves what was in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["properties_for"]

_PROPERTIES = {"SNIPPETS_MODE": "DISABLE"}
_OF_TWO = frozenset(
    {"Add", "Subtract", "Multiply", "Divide", "FloorMod", "Maximum", "Minimum", "Mod", "Power"}
    | {"SquaredDifference"}
)
_MOST_DIMENSIONS = 2
# Inputs that may not be empty, by the beginning of an operator's name. (Those of shapes may be.)
_LOOKED_AT = {
    "Gather": (1,),
    "MatMul": (0, 1),
    "Convolution": (0, 1),
    "GroupConvolution": (0, 1),
    "Reduce": (0,),
}


def properties_for(model: Any, device: str) -> dict[str, str]:
    """What to compile a model with, besides.

    Raises:
        RuntimeError: it cannot be compiled on such a device.
    """
    if not _may_be_cpu(device):
        return {}
    nodes = model.get_ops()
    for node in nodes:
        if _is_of_nothing(node):
            kind = node.get_type_name()
            raise RuntimeError(f"OpenVINO crashes, or answers with noise, in a {kind} of nothing.")
    if not _is_dangerous(nodes):
        return {}
    if device != "CPU":
        raise RuntimeError(
            f"OpenVINO would end the process over these linear layers on {device}; CPU takes them."
        )
    return _PROPERTIES


def _may_be_cpu(device: str) -> bool:
    kind, _, named = device.partition(":")
    return "CPU" in named if named else not kind.startswith(("GPU", "NPU"))


def _is_dangerous(nodes: Sequence[Any]) -> bool:
    linear, meeting = 0, False
    for node in nodes:
        kind = node.get_type_name()
        if kind == "MatMul":
            linear += _is_small(node) and _is_constant(node.input_value(1))
        elif kind in _OF_TWO and not meeting:
            meeting = _is_small(node) and not any(map(_is_constant, node.input_values()))
    return meeting and linear >= 2


def _is_of_nothing(node: Any) -> bool:
    """Whether it gathers by an index of no elements, or adds up over no elements."""
    kind = node.get_type_name()
    ports = next((ports for start, ports in _LOOKED_AT.items() if kind.startswith(start)), ())
    shapes = (node.input(port).get_partial_shape() for port in ports)
    known = (shape for shape in shapes if shape.rank.is_static)
    return any(size.is_static and size.get_length() == 0 for shape in known for size in shape)


def _is_small(node: Any) -> bool:
    shape = node.output(0).get_partial_shape()
    return bool(shape.is_static) and shape.rank.get_length() <= _MOST_DIMENSIONS


def _is_constant(value: Any) -> bool:
    """Whether it is one, in another type perhaps."""
    node = value.get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")
