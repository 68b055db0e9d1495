"""Parts of a graph in bf16 or fp16: typed islands.

OpenVINO takes one precision for a whole model as a hint, and ignores what is asked of single
operations. But it computes an operation in the type that it has: so where a part begins its inputs
are converted, and its outputs are where it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ovshim import runtime
from ovshim.capture.names import same_origin

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["lower"]

# These say themselves of what type their result is, hold graphs of their own, or belong to the
# quantization, which OpenVINO recognizes in f32 only.
_LEFT_ALONE = frozenset(
    {
        "Constant",
        "Convert",
        "ConvertLike",
        "ConvertPromoteTypes",
        "FakeConvert",
        "FakeQuantize",
        "If",
        "Loop",
        "Parameter",
        "Result",
        "TensorIterator",
    }
)

_FLOAT16 = (-65504.0, 65504.0)


def lower(model: ov.Model, precision_of: Callable[[Any], str | None]) -> None:
    """Give every operation the floating type that `precision_of` says (fp32, bf16 or fp16), in
    place. One of which it says None gets that of what it computes with.

    Raises:
        RuntimeError: an operation does not exist in that type.
    """
    ov = runtime.openvino()
    types = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16, "fp16": ov.Type.f16}
    floats = list(types.values())
    nodes = model.get_ordered_ops()
    kept = _kept(nodes)
    made: dict[tuple[str, int, str], Any] = {}
    for node in nodes:
        name = node.get_name()
        if node.get_type_name() in ("Convert", "ConvertLike"):
            wanted = []
        elif name in kept:
            wanted = kept[name]
        else:
            precision = precision_of(node)
            of = _type_of_inputs(node, floats) if precision is None else types[precision]
            wanted = [of] * len(node.inputs())
        for port, of in zip(node.inputs(), wanted, strict=False):
            source = port.get_source_output()
            now = source.get_element_type()
            if now in floats and of in floats and now != of:
                port.replace_source_output(_converted(source, of, node, made))
        if node.inputs():
            node.validate_and_infer_types()
    model.validate_nodes_and_infer_types()


def _type_of_inputs(node: Any, floats: Sequence[Any]) -> Any:
    """The floating type of the first input that is no constant; None where there is none."""
    for port in node.inputs():
        source = port.get_source_output()
        computed = source.get_node().get_type_name() != "Constant"
        if computed and source.get_element_type() in floats:
            return source.get_element_type()
    return None


def _kept(nodes: Sequence[Any]) -> dict[str, list[Any]]:
    """The types of the inputs of those operations that keep them: those left alone, and those that
    compute nothing but a weight out of constants, for compressed weights are recognized in the
    types that they were written in."""
    folded: set[str] = set()
    kept = {}
    for node in nodes:
        sources = [port.get_source_output() for port in node.inputs()]
        names = {source.get_node().get_name() for source in sources}
        if node.get_type_name() == "Constant" or (names and names <= folded):
            folded.add(node.get_name())
        if node.get_type_name() in _LEFT_ALONE or node.get_name() in folded:
            kept[node.get_name()] = [source.get_element_type() for source in sources]
    return kept


def _converted(source: Any, of: Any, node: Any, made: dict[tuple[str, int, str], Any]) -> Any:
    from openvino import opset13 as ops

    before = source.get_node()
    key = (before.get_name(), source.get_index(), of.to_string())
    if key not in made:
        if before.get_type_name() == "Constant":
            # Folded here: a weight in its own type takes half the room in the file. What float16
            # cannot hold (the minimum in a mask) is cut, as OpenVINO does under a hint.
            values = before.get_data(dtype=np.float32)
            if of == runtime.openvino().Type.f16:
                values = np.clip(values, *_FLOAT16)
            new = ops.constant(values, dtype=of)
        else:
            new = ops.convert(source, of.to_string())
        same_origin(new, node)
        made[key] = new.output(0)
    return made[key]
