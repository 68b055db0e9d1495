"""A step whose keys and values are inputs and outputs becomes one that keeps them as state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ovshim import runtime

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["make_stateful", "variable"]


def variable(number: int) -> str:
    """The name of the state for the keys (even numbers) or values (odd) of a layer."""
    return f"past.{number}.present.{number}"


def make_stateful(model: ov.Model, names: Sequence[str], states: int) -> None:
    """Turn a step graph into a stateful one, in place.

    It gets one more input, `beams`: for each row of the batch, the row of the state that it goes on
    from.

    Args:
        model: takes inputs, then the past as `states` tensors of shape
            [batch, heads, past, width]; gives the logits, as many tensors of the present, and
            perhaps more.
        names: of the inputs before the past.
    """
    ov = runtime.openvino()
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    given, results = model.get_parameters(), model.get_results()
    for parameter, name in zip(given, names, strict=False):
        parameter.output(0).get_tensor().set_names({name})
    beams = ops.parameter([-1], ov.Type.i32, name="beams")
    beams.output(0).get_tensor().set_names({"beams"})
    pairs = {}
    for number in range(states):
        past, present = given[len(names) + number], results[1 + number]
        # The row to go on from is gathered between the state and whatever reads it: the form in
        # which the CPU plugin recognises attention over a cache.
        readers = past.output(0).get_target_inputs()
        gathered = ops.gather(past, beams, ops.constant(np.int64(0)))
        for reader in readers:
            reader.replace_source_output(gathered.output(0))
        past.output(0).get_tensor().set_names({f"past.{number}."})
        present.input_value(0).get_tensor().set_names({f"present.{number}"})
        pairs[f"past.{number}."] = f"present.{number}"
    model.add_parameters([beams])
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, pairs)
    batch = ops.shape_of(beams, output_type="i64")
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            # Nothing is there before the first step: as many rows as the call has, and no length.
            rest = [size.get_min_length() for size in node.get_output_partial_shape(0)][1:]
            shape = ops.concat([batch, ops.constant(np.array(rest, dtype=np.int64))], axis=0)
            zero = ops.constant(0, dtype=node.get_output_element_type(0))
            node.set_arguments([ops.broadcast(zero, shape).output(0)])
    model.validate_nodes_and_infer_types()
