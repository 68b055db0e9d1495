"""From a module and an example to an OpenVINO model, by one of several routes.

    dynamo     torch's own full-graph capture, with its guards: right, or it refuses
    traced     `torch.jit.trace` of the module itself, where Dynamo refuses for a harmless reason
    onnx       for a module that is an ONNX model: that model

`frontend` turns what the first two traced into an `ov.Model`, whose operations `names` knows by
their modules; what it refuses, `readers` gives to OpenVINO by way of ONNX (`dynamo-onnx`,
`traced-onnx`).
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ovshim import garbage
from ovshim.guards import ValueGuard
from ovshim.imports import import_apart
from ovshim.onnx_module import OnnxModule
from ovshim.reasons import Reason
from ovshim.signals import raise_heard
from ovshim.signature import Kind, Pattern, TensorLeaf, flatten, unflatten_call
from ovshim.views import Views, refusal

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["TRACE_LOCK", "CaptureError", "Captured", "FlatModule", "Request", "capture"]

# torch's tracer and Dynamo keep process-wide state: of four concurrent conversions three failed.
TRACE_LOCK = threading.RLock()


# What is imported for a first capture, some of it in its midst: an interrupt that leaves half of
# torch._dynamo behind would take torch.compile from the whole process.
_USED = (
    "torch._dynamo.convert_frame",
    "torch._dynamo.polyfills.loader",
    "torch._dynamo.dce_extra_outputs",
    "torch._export.passes.replace_view_ops_with_view_copy_ops_pass",
    "torch._higher_order_ops.passes.inline_invoke_subgraph",
    "torch.fx.experimental.validator",
    "torch.onnx.operators",
    "sympy.assumptions.wrapper",
    "sympy.tensor.tensor",
    "openvino._offline_transformations",
    "openvino.frontend.pytorch.ts_decoder",
    "ovshim.capture.dynamo",
    "ovshim.capture.traced",
)


class CaptureError(Exception):
    """A route that could not capture the module, with the reason.

    Attributes:
        reason: what a report shows.
        harmless: whether another route may try. Not after a dependence on values, a mutation, a
            side effect or random numbers: a trace would bake one outcome in, silently.
    """

    def __init__(self, reason: Reason, harmless: bool = False) -> None:
        super().__init__(str(reason))
        self.reason = reason
        self.harmless = harmless


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be captured.

    Attributes:
        module: the module whose tensors the graph uses.
        call: the user's own method, bound to `module`.
        kind: the calls it is captured for.
        leaves: an example of such a call, flattened; its tensors are ours, nobody else's.
        dynamic: for each tensor, the dimensions that should be able to change.
        outputs: which leaves of the output the graph should compute, in order: the tensors, and the
            numbers, which it computes where they depend on sizes.
        marked: whether the graph's operations are to say which module they come from
            (`names`).
        overlaps: pairs of leaves of the output that have memory in common.
    """

    module: nn.Module
    call: Callable[..., Any]
    kind: Kind
    leaves: Sequence[Any]
    dynamic: tuple[frozenset[int], ...]
    outputs: tuple[int, ...]
    marked: bool = False
    overlaps: tuple[tuple[int, int], ...] = ()

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]

    def with_open(self, dynamic: tuple[frozenset[int], ...]) -> Request:
        """The same with other dimensions open, and tensors without marks of earlier tries."""
        made = {id(tensor): tensor.detach().clone() for tensor in self.tensors}
        leaves = [made[id(x)] if isinstance(x, torch.Tensor) else x for x in self.leaves]
        leaves = self.kind.requiring(leaves)
        return dataclasses.replace(self, dynamic=dynamic, leaves=leaves)


@dataclasses.dataclass(frozen=True)
class Captured:
    """A graph and what it takes for granted.

    Attributes:
        model: takes the call's distinct tensors in order, gives the leaves `outputs` in order.
        pattern: the sizes it was captured for, None where they may change.
        size_guards, value_guards: see `ovshim.guards`.
        code: qualified names of the functions that were captured; None: not known.
        checked: whether the model has one more output: whether all indices were in range.
        any_mode: whether it would be the same with grad mode switched over.
        asks: what its code asks of tensors (`questions.Questions.asks`); None: not known.
        views: leaves of the output that are taken of `outputs`.
    """

    model: ov.Model
    route: str
    outputs: tuple[int, ...]
    pattern: Pattern
    size_guards: tuple[str, ...] = ()
    value_guards: tuple[ValueGuard, ...] = ()
    code: tuple[str, ...] | None = None
    checked: bool = False
    any_mode: bool = False
    asks: tuple[str, ...] | None = None
    views: Views = dataclasses.field(default_factory=dict)


def capture(request: Request) -> Captured:
    """Capture by the first route that can.

    Raises:
        CaptureError: none can, or outputs have memory in common in a way that is not known.
    """
    captured = _captured(request)
    overlap = refusal(request.overlaps, captured.views)
    if overlap is not None:
        raise CaptureError(overlap)
    return captured


def _captured(request: Request) -> Captured:
    if isinstance(request.module, OnnxModule):
        from ovshim.capture import onnx

        return onnx.capture(request)
    with TRACE_LOCK, garbage.apart(), torch.autocast("cpu", enabled=False):
        ours = "torch._dynamo.utils" not in sys.modules
        import_apart(*_USED)
        from ovshim.capture import dynamo, spared, traced

        if ours:
            spared.leave_exits_alone()

        try:
            return dynamo.capture(request)
        except CaptureError as refused:
            raise_heard()
            if not refused.harmless:
                raise
            return traced.capture(request, refused)


class FlatModule(nn.Module):
    """Takes the distinct tensors of a call and gives the computed tensors of its output: the form
    in which a graph is traced.

    The user's module is not a submodule of it: the tracer reads every attribute and property of
    those, and a property may warn, log or do anything. Its tensors are, under their own names: the
    tracer refuses to bake a tensor that requires grad into a graph unless it knows it as one.

    Args:
        run: what is called, with the rebuilt arguments.
        in_range: gives, after a run, the tensor that says whether all indices were in range.
        views_among: gives, after a run, which leaves of its output are views of others.

    Attributes:
        outputs: after a call: those of the requested leaves that are computed.
        views: after a call: those that are taken of `outputs`.
    """

    def __init__(
        self,
        request: Request,
        run: Callable[..., Any],
        in_range: Callable[[], torch.Tensor | None] = lambda: None,
        views_among: Callable[[Sequence[Any]], Views] = lambda leaves: {},
    ) -> None:
        super().__init__()
        scripted = any(isinstance(m, torch.jit.ScriptModule) for m in request.module.modules())
        # The tensors of a scripted module are known through it alone.
        self.module = request.module if scripted else _weights_of(request.module)
        self._run = run
        self._in_range = in_range
        self._views_among = views_among
        self._request = request
        self.training = False
        self.outputs: tuple[int, ...] = ()
        self.views: Views = {}

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        request = self._request
        given = dict(zip(request.kind.distinct, tensors, strict=True))
        leaves = [
            given[leaf.same_as] if isinstance(leaf, TensorLeaf) else constant
            for leaf, constant in zip(request.kind.leaves, request.leaves, strict=True)
        ]
        args, kwargs = unflatten_call(leaves, request.kind.structure)
        results, _ = flatten(self._run(*args, **kwargs))
        # A number that depends on sizes is a tensor while it is traced; others are constants.
        self.views = self._views_among(results)
        computed = [i for i in request.outputs if isinstance(results[i], torch.Tensor)]
        self.outputs = tuple(i for i in computed if i not in self.views)
        verdict = self._in_range()
        return (*(results[i] for i in self.outputs), *([] if verdict is None else [verdict]))


def _weights_of(module: nn.Module) -> nn.Module:
    """One empty module that holds a module's tensors: OpenVINO's frontend goes from the top to a
    tensor each time that the graph names it, and in a tree that takes a second for a ResNet-50."""
    root = nn.Module()
    for n, (name, parameter) in enumerate(module.named_parameters()):
        root.register_parameter(_flat(name, n), parameter)
    for n, (name, buffer) in enumerate(module.named_buffers()):
        root.register_buffer(_flat(name, n), buffer)
    return root


def _flat(name: str, number: int) -> str:
    # With the number no two are alike: not `a.b_c` and `a_b.c`.
    return f"{name.replace('.', '_')}_{number}"
