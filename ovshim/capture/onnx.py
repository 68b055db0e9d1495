"""The route for modules that are ONNX models already: OpenVINO reads the model itself.

What the other routes learn from Python is read off the graph here: sizes that values decide, and
branches on values, are refused; indices are looked at inside the graph.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from ovshim import runtime
from ovshim.capture import Captured, CaptureError, Request
from ovshim.capture.frontend import guarded
from ovshim.onnx_module import OnnxModule
from ovshim.reasons import reason
from ovshim.signature import Pattern, TensorLeaf, unflatten_call

__all__ = ["capture", "of_values", "refuse_by_values"]

# Inputs of these operations that decide how large their output is.
_SIZED_BY = {
    "Broadcast": (1,),
    "Interpolate": (1, 2),
    "OneHot": (1,),
    "Pad": (1, 2),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Slice": (1, 2, 3),
    "Split": (1,),
    "VariadicSplit": (2,),
    "StridedSlice": (1, 2, 3),
    "Tile": (1,),
    "TopK": (1,),
    # How many there are of what they look for; whether they run at all, and how often.
    "NonZero": (0,),
    "Unique": (0,),
    "NonMaxSuppression": (0, 1),
    "If": (0,),
    "Loop": (0, 1),
}
# Operations that read at computed places: by the input that says where, and by the axis.
_INDEXED = {"Gather": (1, 2), "GatherElements": (1, None)}
_UNCHECKED = frozenset({"If", "Loop", "TensorIterator", "GatherND", "GatherTree", "ScatterUpdate",
                        "ScatterNDUpdate", "ScatterElementsUpdate", "EmbeddingBagOffsets",
                        "EmbeddingBagPacked"})  # fmt: skip


def capture(request: Request) -> Captured:
    """The graph of an ONNX model for these calls.

    Raises:
        CaptureError: OpenVINO does not take it, or values decide what runs in it.
    """
    module = request.module
    assert isinstance(module, OnnxModule)
    source = module.held.source
    model = guarded(lambda: runtime.core().read_model(source))
    if guarded(module.digest_now) != module.digest:
        raise CaptureError(reason("capture-failed", "the file has changed since it was opened"))
    pattern, guards = _sizes(request, module)
    refuse_by_values(model)
    parameters = _parameters(request, module, model, pattern)
    results = {name: result for result in model.get_results()
               for name in result.output(0).get_names()}  # fmt: skip
    chosen = [results[module.outputs[i].name] for i in request.outputs]
    in_range = _in_range(model)
    if in_range is not None:
        chosen.append(in_range)
    made = guarded(lambda: runtime.openvino().Model(chosen, parameters, type(module).__name__))
    guarded(made.validate_nodes_and_infer_types)
    return Captured(
        made, "onnx", request.outputs, pattern, guards, (), None, checked=in_range is not None
    )


def _leaves(request: Request, module: OnnxModule) -> list[int]:
    """For each input of the model, the leaf of the call that it takes."""
    args, kwargs = unflatten_call(list(range(len(request.leaves))), request.kind.structure)
    known = {port.name: port.parameter for port in module.inputs}
    named = {known.get(name, name): leaf for name, leaf in kwargs.items()}
    bound = inspect.signature(type(module).forward).bind(module, *args, **named).arguments
    return [bound[port.parameter] for port in module.inputs]


def _sizes(request: Request, module: OnnxModule) -> tuple[Pattern, tuple[str, ...]]:
    """The sizes to capture for: open where that is asked for and the model leaves them open; and
    which of them the model says are one."""
    tensors = list(request.kind.tensors)
    sizes: list[list[int | None]] = [list(tensor.shape) for tensor in request.tensors]
    places: dict[str, list[tuple[int, int]]] = {}
    for port, leaf in zip(module.inputs, _leaves(request, module), strict=True):
        t = tensors.index(leaf)
        for d, dim in enumerate(port.dims):
            if isinstance(dim, str) and d in request.dynamic[t]:
                sizes[t][d] = None
                places.setdefault(dim, []).append((t, d))
    guards = [
        f"s{t}[{d}] == s{first[0]}[{first[1]}]"
        for first, *others in places.values()
        for t, d in others
        if (t, d) != first
    ]
    return tuple(map(tuple, sizes)), tuple(dict.fromkeys(guards))


def _parameters(request: Request, module: OnnxModule, model: Any, pattern: Pattern) -> list[Any]:
    """The graph's parameters, one for each distinct tensor of the call, in order."""
    ov = runtime.openvino()
    ports = {name: port for port in model.inputs for name in port.get_names()}
    tensors = list(request.kind.tensors)
    found: dict[int, Any] = {}
    for port, leaf in zip(module.inputs, _leaves(request, module), strict=True):
        shown = request.kind.leaves[leaf]
        assert isinstance(shown, TensorLeaf)
        dims = ov.PartialShape([-1 if n is None else n for n in pattern[tensors.index(leaf)]])
        if port.name in ports:
            parameter = ports[port.name].get_node()
            parameter.set_partial_shape(dims)
        else:  # nothing reads it
            like = np.dtype(str(port.dtype).removeprefix("torch."))
            parameter = ov.opset13.parameter(dims, like)
        if shown.same_as in found:  # one tensor, given twice
            parameter.output(0).replace(found[shown.same_as].output(0))
        else:
            found[shown.same_as] = parameter
    return [found[i] for i in request.kind.distinct]


# --- what depends on values -----------------------------------------------------------------------


def refuse_by_values(model: Any) -> None:
    """Where values decide how large a tensor is there may be none, and kernels of OpenVINO 2026.4
    end the process on those; where they decide what runs, a proof has seen one of the ways."""
    for node in model.get_ops():
        name = node.get_type_name()
        for place in _SIZED_BY.get(name, ()):
            if place < node.get_input_size() and of_values(node.input_value(place)):
                detail = f"{name} {node.get_friendly_name()}"
                raise CaptureError(reason("value-dependent", detail))
        if name == "If":
            refuse_by_values(node.get_then_body())
            refuse_by_values(node.get_else_body())
        elif name in ("Loop", "TensorIterator"):
            refuse_by_values(node.get_function())


def of_values(output: Any) -> bool:
    """Whether something is computed of values of the inputs, and not of their sizes alone."""
    seen: set[str] = set()
    waiting = [output.get_node()]
    while waiting:
        node = waiting.pop()
        if node.get_name() in seen or node.get_type_name() == "ShapeOf":
            continue
        seen.add(node.get_name())
        if node.get_type_name() == "Parameter":
            return True
        waiting += [value.get_node() for value in node.input_values()]
    return False


def _in_range(model: Any) -> Any:
    """A boolean: whether all indices that are computed of values lie within their tables. None
    where there are none, or some that cannot be looked at."""
    op = runtime.openvino().opset13
    checks = []
    for node in model.get_ops():
        name = node.get_type_name()
        if name in _UNCHECKED:
            return None
        if name not in _INDEXED or not of_values(node.input_value(_INDEXED[name][0])):
            continue
        checks.append(_within(op, node, _INDEXED[name]))
    if not checks:
        return None
    verdict = checks[0]
    for check in checks[1:]:
        verdict = op.logical_and(verdict, check)
    return op.result(verdict)


def _within(op: Any, node: Any, places: tuple[int, int | None]) -> Any:
    """Whether every index of an operation is within its table."""
    where, axis = places
    given = node.input_value(where)
    index = op.convert(given, "i64")
    if axis is not None:
        along = node.input_value(axis)
    else:
        along = op.constant(np.int64(node.get_attributes()["axis"])).output(0)
    size = op.gather(op.shape_of(node.input_value(0), "i64"), along, np.int64(0))
    lower = op.greater_equal(index, op.multiply(size, np.int64(-1)))
    ok = op.logical_and(lower, op.less(index, size))
    if axis is None:
        # Its kernel raises for an index beside the table, after which no engine may go on.
        inside = op.select(ok, given, op.convert_like(np.int64(0), given))
        node.input(where).replace_source_output(inside.output(0))
    each = op.reshape(ok, np.array([-1]), False)
    return op.reduce_logical_and(each, np.array([0]))
