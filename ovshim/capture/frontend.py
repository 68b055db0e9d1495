"""From a traced graph to an `ov.Model`.

OpenVINO's PyTorch frontend is called directly, as `ov.convert_model` calls it. That function would
trace the module a second and a third time, put it into evaluation mode, change example inputs and
report home; on a BERT-base it takes 4.4 s where this takes 0.8 (measured on torch 2.13, OpenVINO
2026.4). It remains the way in should the frontend's interface move.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ovshim import runtime
from ovshim.capture import CaptureError, FlatModule, names
from ovshim.capture.hush import hushed
from ovshim.reasons import reason

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["Origin", "convert", "guarded", "refuse_what_kills", "trace"]

log = logging.getLogger("ovshim")

# From a node of a traced graph to the path of its module; None where nobody knows.
Origin = Callable[[Any], str | None]

_functorch: Any = torch._C._functorch

# Converted without a word, and then a segmentation fault when they are compiled or run (OpenVINO
# 2026.4); `linspace` of tensors by way of ONNX as well.
_KILLERS = ("aten::det", "aten::linalg_det", "aten::svd")
_OPERATOR = re.compile(r"\b(?:aten|prim|prims|torchvision|quantized|fb|higher_order)::\w+")


def trace(
    flat: FlatModule, tensors: Sequence[torch.Tensor], said: list[str] | None = None
) -> torch.jit.ScriptModule:
    """The TorchScript graph of a flat module. The caller holds `capture.TRACE_LOCK`.

    Args:
        said: what was warned of meanwhile is added to it.

    Raises:
        CaptureError: torch cannot trace it.
    """
    transforms = _functorch.get_dynamic_layer_stack_depth()
    try:
        # Of what the tracer says, guards and proof find out what matters; what the user's own code
        # says, eager has said already; and torch's wrappers read deprecated properties.
        with hushed() as texts:
            traced = torch.jit.trace(  # type: ignore[no-untyped-call]
                flat, tuple(tensors), strict=False, check_trace=False
            )
    except Exception as error:  # whatever a user's forward or torch's tracer raises
        log.debug("tracing failed", exc_info=True)
        # A trace that fails inside of vmap or grad leaves these on, for all calls to come.
        _functorch.pop_dynamic_layer_stack_and_undo_to_depth(transforms)
        raise CaptureError(
            reason("capture-failed", f"torch.jit.trace: {_first_line(error)}")
        ) from error
    if said is not None:
        said += texts
    _refuse_places(traced)
    return traced  # type: ignore[no-any-return]


def _refuse_places(traced: torch.jit.ScriptModule) -> None:
    """Raises CaptureError for a graph that counts from where a storage begins: an input's values
    begin where they like in theirs."""
    graph: Any = traced.inlined_graph
    for node in graph.findAllNodes("aten::as_strided"):
        *_, offset = node.inputs()
        if str(offset.type()) != "NoneType":
            detail = "as_strided counts from where the storage begins"
            raise CaptureError(reason("value-dependent", detail))


def convert(
    traced: torch.jit.ScriptModule,
    shapes: Sequence[Sequence[int | None]],
    origin: Origin | None = None,
) -> ov.Model:
    """The OpenVINO model of a traced graph, its constants sharing torch's memory.

    Args:
        shapes: sizes of each input, None where they may change.
        origin: where it is given, operations are marked with their modules.

    Raises:
        CaptureError: an operator is unknown to OpenVINO, or its frontend fails otherwise.
    """
    ov = runtime.openvino()
    try:
        model = _by_frontend(traced, origin)
    except _InterfaceMovedError as moved:
        log.info("OpenVINO's PyTorch frontend has moved (%s): ov.convert_model serves", moved)
        model = guarded(lambda: runtime.openvino().convert_model(traced))
    if len(model.inputs) != len(shapes):
        detail = f"the graph has {len(model.inputs)} inputs for {len(shapes)} tensors"
        raise CaptureError(reason("capture-failed", detail))
    for parameter, sizes in zip(model.get_parameters(), shapes, strict=True):
        dims = [-1 if size is None else size for size in sizes]
        parameter.set_partial_shape(ov.PartialShape(dims))
    guarded(model.validate_nodes_and_infer_types)
    return model


def refuse_what_kills(traced: torch.jit.ScriptModule) -> None:
    """Raises CaptureError for a graph that no reader of OpenVINO's may be given."""
    graph: Any = traced.inlined_graph
    found = [kind for kind in _KILLERS if graph.findAllNodes(kind)]
    for node in graph.findAllNodes("aten::linspace"):
        ends = list(node.inputs())[:2]
        found += ["aten::linspace of tensors" for end in ends if "Tensor" in str(end.type())]
    if found:
        detail = f"{found[0]}, with which OpenVINO ends the process"
        raise CaptureError(reason("unsupported-op", detail))


class _InterfaceMovedError(Exception):
    """The frontend's Python interface is not the one this was written for."""


def _by_frontend(traced: torch.jit.ScriptModule, origin: Origin | None) -> ov.Model:
    runtime.openvino()
    try:
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        decoder = (_marking(origin) if origin else TorchScriptPythonDecoder)(traced)
        frontend = FrontEndManager().load_by_framework("pytorch")
        convert = frontend.convert, frontend.load
    except (ImportError, AttributeError, TypeError) as error:
        raise _InterfaceMovedError(str(error)) from error
    return guarded(lambda: convert[0](convert[1](decoder)))


def _marking(origin: Origin) -> Any:
    """A decoder whose operations are marked with the modules that they come from."""
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    class Marking(TorchScriptPythonDecoder):  # type: ignore[misc]
        # Theirs makes decoders of its own class for the nodes within.
        def visit_subgraph(self, node_visitor: Callable[[Any], None]) -> None:
            for node in self.graph_element.nodes():
                decoder = Marking(
                    self.pt_module,
                    node,
                    alias_db=self.alias_db,
                    shared_memory=self._shared_memory,
                    constant_cache=self.constant_cache,
                    module_extensions=self.module_extensions,
                )
                self.m_decoders.append(decoder)
                node_visitor(decoder)

        def mark_node(self, node: Any) -> Any:
            path = origin(self.graph_element)
            if path is not None:
                names.mark(node, path, self.graph_element.kind())
            return super().mark_node(node)

    return Marking


def guarded(call: Any) -> Any:
    """Run a step of OpenVINO's; its failures become a CaptureError.

    `OpConversionFailure` is not a RuntimeError, and some converters raise a bare Exception: only
    Exception catches them all."""
    try:
        return call()
    except Exception as error:
        log.debug("OpenVINO's frontend failed", exc_info=True)
        operators = sorted(set(_OPERATOR.findall(str(error))))
        if "No conversion rule" in str(error) or "unconverted" in str(error).lower():
            raise CaptureError(reason("unsupported-op", ", ".join(operators))) from error
        detail = f"{_first_line(error)} {', '.join(operators)}"
        raise CaptureError(reason("capture-failed", detail.strip())) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
