"""The second route: `torch.jit.trace` of the module itself.

A trace records what one call did. It is right where every call does the same, so it is used only
where Dynamo refused for a harmless reason (TorchScript inside, an unknown builtin), after a
preflight has found the module free of side effects, where no value of a tensor reaches Python, and
only when two traces with other data, another batch and other lengths are the same graph with the
same constants. Sizes that reach Python as numbers are those of the example.
"""

from __future__ import annotations

import logging
from itertools import chain
from typing import Any

import torch
import xxhash
from torch.overrides import TorchFunctionMode

from ovshim.capture import Captured, CaptureError, FlatModule, Request, frontend, readers
from ovshim.capture.hush import hushed
from ovshim.capture.refusals import ESCAPES
from ovshim.generation import Generation
from ovshim.inputs import redraw, resize
from ovshim.reached import UnwatchableError
from ovshim.reasons import reason
from ovshim.signature import Pattern

__all__ = ["capture"]

# How many rows these give depends on values; two traces with as many tell nothing.
_SIZES_BY_VALUES = ("aten::nonzero", "aten::masked_select", "aten::_unique", "aten::unique")

# Of tensors OpenVINO rounds these otherwise, and divides integers by 0. On Dynamo's route they are
# replaced (`rewrites.division`) and asked about (`domains`).
_DIVISIONS = ("aten::div", "aten::divide", "aten::div_", "aten::divide_")
_ROUNDED = tuple(
    f"aten::{name}{way}" for name in ("floor_divide", "remainder", "fmod") for way in ("", "_")
)

# What the tracer says where something of a tensor becomes a constant, or a choice.
_BAKED_IN = "the trace"
# Outside of a graph there are more ways for a value to leave it.
_READS = ESCAPES | {
    *("equal", "allclose", "is_nonzero", "__complex__", "__index__"),
    *("__array__", "__contains__", "__format__"),
}

log = logging.getLogger("ovshim")


def capture(request: Request, refused: CaptureError) -> Captured:
    """Capture `request` by tracing. The caller holds `capture.TRACE_LOCK`.

    Raises:
        CaptureError: `refused`, Dynamo's own reason, where tracing fails as well; or that the graph
            depends on the values of the inputs, or that the module changes what it reads.
    """
    watched = _watched(request)
    inputs = request.kind.distinct
    places = [request.kind.tensors.index(i) for i in inputs]
    tensors = [request.leaves[i] for i in inputs]
    dynamic = [request.dynamic[t] for t in places]
    flat = FlatModule(request, request.call)
    said: list[str] = []
    try:
        traced = frontend.trace(flat, tensors, said)
    except CaptureError as error:
        raise refused from error
    outputs = flat.outputs
    first = _skeleton(traced.inlined_graph)
    if any(name in line for line in first for name in _SIZES_BY_VALUES):
        raise CaptureError(reason("value-dependent", "the size of a tensor is"))
    _refuse_rounded(traced)
    _refuse_values(flat, tensors)
    if any(_BAKED_IN in text for text in said):  # a size, then
        dynamic = [frozenset() for _ in dynamic]
    generator = torch.Generator().manual_seed(0)
    if first != _skeleton(frontend.trace(flat, _redrawn(tensors, generator)).inlined_graph):
        raise CaptureError(reason("value-dependent", "two traces with other values differ"))
    dynamic = [
        dims if _same_resized(flat, tensors, dynamic, first) else frozenset() for dims in dynamic
    ]
    if watched is not None and not watched.holds():  # the look goes no deeper than attributes
        raise CaptureError(reason("mutates-attribute", watched.change()))
    shapes = [
        tuple(None if d in dims else n for d, n in enumerate(tensor.shape))
        for tensor, dims in zip(tensors, dynamic, strict=True)
    ]
    model, reader = readers.read(traced, tensors, shapes)
    by_leaf = dict(zip(inputs, shapes, strict=True))
    pattern: Pattern = tuple(by_leaf[request.kind.leaves[i].same_as] for i in request.kind.tensors)  # type: ignore[union-attr]
    return Captured(model, f"traced{reader}", outputs, pattern)


class _Reading(TorchFunctionMode):
    """Notes what takes a value out of a tensor. Sizes are numbers while nothing is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS:
            self.found = name
        return func(*args, **(kwargs or {}))


def _refuse_values(flat: FlatModule, tensors: list[torch.Tensor]) -> None:
    """Raise CaptureError where Python reads the value of a tensor."""
    with _Reading() as reading, hushed():
        flat(*tensors)
    if reading.found is not None:
        raise CaptureError(reason("value-dependent", f"{reading.found} of a tensor"))


def _refuse_rounded(traced: torch.jit.ScriptModule) -> None:
    """Raise CaptureError for quotients of tensors that are rounded, and their remainders."""
    graph: Any = traced.inlined_graph
    for node in chain.from_iterable(map(graph.findAllNodes, (*_ROUNDED, *_DIVISIONS))):
        rounded = node.kind() in _ROUNDED or _rounding_mode(node)
        if rounded and "Tensor" in node.output().type().kind() and not _is_size(node.output()):
            detail = f"{node.kind()} with rounding, in a trace"
            raise CaptureError(reason("unsupported-op", detail))


def _rounding_mode(division: Any) -> bool:
    given = list(division.inputs())[2:]
    return bool(given) and given[0].type().kind() != "NoneType"


def _is_size(value: Any) -> bool:
    """Whether it is a whole number, as sizes are tensors while they are traced."""
    kind = value.type()
    return bool(kind.scalarType() == "Long" and kind.sizes() == [])


def _watched(request: Request) -> Generation | None:
    """What the module could read, as it is now; None where its weights cannot be watched, which
    the plan will say."""
    module = getattr(request.call, "__self__", request.module)
    try:
        return Generation(module, follow=True)
    except ValueError:
        return None
    except UnwatchableError as error:
        raise CaptureError(reason("capture-failed", f"traced, and {error}")) from error


def _redrawn(tensors: list[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    return [redraw(tensor, generator) for tensor in tensors]


def _same_resized(
    flat: FlatModule, tensors: list[torch.Tensor], dynamic: list[frozenset[int]], first: list[str]
) -> bool:
    """Whether a trace at other sizes is the same graph: then no size is baked into it."""
    # By dimension, not by tensor: tensors that share a batch or a length change together.
    new = {(t, d): tensors[t].shape[d] + 1 + d for t, dims in enumerate(dynamic) for d in dims}
    if not new:
        return True
    open_: Pattern = tuple((None,) * tensor.dim() for tensor in tensors)
    try:
        other = frontend.trace(flat, resize(tensors, open_, new))
    except CaptureError as error:
        log.debug("sizes are pinned: eager refuses others (%s)", error)
        return False
    return _skeleton(other.inlined_graph) == first


def _skeleton(graph: Any) -> list[str]:
    """The graph as lines that are alike for like graphs: operators, wiring, attribute names and
    constants; no sizes, and no names, which count up within a process."""
    numbers: dict[str, int] = {}

    def number(value: Any) -> int:
        return numbers.setdefault(value.debugName(), len(numbers))

    def lines(block: Any) -> list[str]:
        found = []
        for node in block.nodes():
            ins = [number(value) for value in node.inputs()]
            outs = [number(value) for value in node.outputs()]
            found.append(f"{outs} = {node.kind()}{ins} {_attributes(node)}")
            for inner in node.blocks():
                found += lines(inner)
        return [*found, f"return {[number(value) for value in block.outputs()]}"]

    return lines(graph)


def _attributes(node: Any) -> str:
    if node.kind() == "prim::GetAttr":
        return str(node.s("name"))
    if node.kind() != "prim::Constant" or (
        not node.mustBeNone() and not node.hasAttribute("value")
    ):
        return ""
    value = node.output().toIValue()
    if not isinstance(value, torch.Tensor):
        return repr(value)
    data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{value.dtype}{tuple(value.shape)}{xxhash.xxh3_128_hexdigest(data.data)}"
