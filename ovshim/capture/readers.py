"""By which of OpenVINO's frontends a traced graph is read.

The one for PyTorch knows most operators. What it refuses is exported to ONNX, the very same graph,
and given to the one for ONNX, which knows some others. Guards, checks of indices and rewrites are
those of the capture; the names of modules are lost.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ovshim import runtime
from ovshim.capture import CaptureError, frontend, onnx
from ovshim.capture.hush import hushed
from ovshim.reasons import reason

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["read"]

log = logging.getLogger("ovshim")

_OPSET = 20  # the newest that torch's exporter of TorchScript writes
_LARGEST = 1 << 30  # bytes of weights: ONNX's one message holds twice that, and is held twice
# Operations by which an index comes to the one that uses it, and the inputs that it comes by.
_PASSING = {
    "Add": (0, 1),
    "Broadcast": (0,),
    "Convert": (0,),
    "Reshape": (0,),
    "Select": (1, 2),
    "Squeeze": (0,),
    "Tile": (0,),
    "Transpose": (0,),
    "Unsqueeze": (0,),
}
# Operations that read or write at computed places: the input that says where.
_PLACED = {
    "EmbeddingBagOffsets": 1,
    "EmbeddingBagPacked": 1,
    "Gather": 1,
    "GatherElements": 1,
    "GatherND": 1,
    "GatherTree": 0,
    "OneHot": 0,
    "ScatterElementsUpdate": 1,
    "ScatterNDUpdate": 1,
    "ScatterUpdate": 1,
}


def read(
    traced: torch.jit.ScriptModule,
    tensors: Sequence[torch.Tensor],
    shapes: Sequence[Sequence[int | None]],
    origin: frontend.Origin | None = None,
) -> tuple[ov.Model, str]:
    """The OpenVINO model of a traced graph, and what its route is called beside the capture's:
    "" or "-onnx". The caller holds `capture.TRACE_LOCK`.

    Args:
        tensors: what it was traced with.
        shapes: sizes of each input, None where they may change.
        origin: where it is given, operations are marked with their modules, which ONNX cannot.

    Raises:
        CaptureError: what the frontend for PyTorch says, where the other refuses as well.
    """
    frontend.refuse_what_kills(traced)
    try:
        return frontend.convert(traced, shapes, origin), ""
    except CaptureError as refused:
        if origin is not None:
            raise
        try:
            model = _through_onnx(traced, tensors, shapes)
        except CaptureError as error:
            log.debug("nor through ONNX: %s", error)
            raise refused from error
        log.info("through ONNX, for OpenVINO does not take it from PyTorch (%s)", refused)
        return model, "-onnx"


def _through_onnx(
    traced: torch.jit.ScriptModule,
    tensors: Sequence[torch.Tensor],
    shapes: Sequence[Sequence[int | None]],
) -> ov.Model:
    weights = sum(tensor.nbytes for tensor in traced.state_dict().values())
    if weights > _LARGEST:
        raise CaptureError(reason("capture-failed", f"{weights} bytes of weights, for ONNX"))
    _refuse_what_damages(traced)
    data = _exported(traced, tensors, shapes)
    core = runtime.core()
    model = frontend.guarded(lambda: core.read_model(data))
    onnx.refuse_by_values(model)
    _refuse_unchecked(model)
    return _in_order(model, tensors, shapes)


def _refuse_what_damages(traced: torch.jit.ScriptModule) -> None:
    """Circular padding: torch's exporter (2.13) counts dimensions as if there were a batch, and
    writes beside its memory where there is none."""
    graph: Any = traced.inlined_graph
    for node in graph.findAllNodes("aten::pad"):
        if list(node.inputs())[2].toIValue() == "circular":
            raise CaptureError(reason("capture-failed", "circular padding, for ONNX"))


def _exported(
    traced: torch.jit.ScriptModule,
    tensors: Sequence[torch.Tensor],
    shapes: Sequence[Sequence[int | None]],
) -> bytes:
    # It calls the inputs so; sizes without a name here are fixed in the graph.
    open_ = {f"in{t}": {d: f"in{t}_{d}" for d, size in enumerate(dims) if size is None}
             for t, dims in enumerate(shapes)}  # fmt: skip
    if torch.onnx.is_in_onnx_export():  # another thread's, and torch knows only one at a time
        raise CaptureError(reason("capture-failed", "somebody else exports to ONNX"))
    buffer = io.BytesIO()
    try:
        with hushed(), _quiet():
            torch.onnx.export(
                traced,
                tuple(tensors),
                buffer,  # type: ignore[arg-type]
                dynamo=False,
                opset_version=_OPSET,
                input_names=list(open_),
                dynamic_axes={name: dims for name, dims in open_.items() if dims},
                # Weights go as they are: to fold them is OpenVINO's work, and the exporter would
                # merge normalizations into convolutions, which rounds otherwise.
                do_constant_folding=False,
            )
    except Exception as error:  # whatever torch's exporter raises
        text = f"torch.onnx: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise CaptureError(reason("capture-failed", text)) from error
    return buffer.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter means to switch its log on where it is on, asks the function instead of its
    answer, and so prints a graph whenever it fails, and leaves the log switched on."""
    from torch.onnx._internal.torchscript_exporter import utils

    exporter: Any = utils
    theirs = exporter.setup_onnx_logging
    exporter.setup_onnx_logging = lambda verbose: contextlib.nullcontext()
    try:
        yield
    finally:
        exporter.setup_onnx_logging = theirs


def _refuse_unchecked(model: ov.Model) -> None:
    """An index beside its table has to be looked at (`ranges`). ONNX has operators with indices
    that no check was made for, as the frontend for PyTorch does not know what they stand for."""
    for node in model.get_ops():
        name = node.get_type_name()
        if name not in _PLACED:
            continue
        index = node.input_value(_PLACED[name])
        if onnx.of_values(index) and not _clamped(index):
            detail = f"{name} with indices that nobody checks"
            raise CaptureError(reason("capture-failed", detail))


def _clamped(index: Any) -> bool:
    """Whether an index comes from the clamp that `ranges` puts before a look-up."""
    node = index.get_node()
    name = node.get_type_name()
    if name == "Maximum":
        return any(v.get_node().get_type_name() == "Minimum" for v in node.input_values())
    ways = [node.input_value(place) for place in _PASSING.get(name, ())]
    ways = [way for way in ways if onnx.of_values(way)]
    return bool(ways) and all(map(_clamped, ways))


def _in_order(
    model: ov.Model, tensors: Sequence[torch.Tensor], shapes: Sequence[Sequence[int | None]]
) -> ov.Model:
    """The model with a parameter for each tensor, in order, those included that nothing reads."""
    package = runtime.openvino()
    ports = {name: port for port in model.inputs for name in port.get_names()}
    parameters = []
    for t, (tensor, dims) in enumerate(zip(tensors, shapes, strict=True)):
        shape = package.PartialShape([-1 if size is None else size for size in dims])
        if f"in{t}" in ports:
            parameter = ports[f"in{t}"].get_node()
            parameter.set_partial_shape(shape)
        else:
            like = str(tensor.dtype).removeprefix("torch.")
            parameter = package.opset13.parameter(shape, package.Type(like))
        parameters.append(parameter)
    made = frontend.guarded(lambda: package.Model(model.get_results(), parameters))
    frontend.guarded(made.validate_nodes_and_infer_types)
    return made
