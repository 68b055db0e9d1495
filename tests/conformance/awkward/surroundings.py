"""What forward reads outside its module (globals, closures, modes), changed between calls."""

from __future__ import annotations

import os
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from conformance.awkward.editing import do
from conformance.awkward.registering import awkward
from conformance.awkward.values import Linear

SCALE = 2.0
TABLE = torch.ones(8)


def _activation(x: Tensor) -> Tensor:
    return x.relu()


ACTIVATION: Callable[[Tensor], Tensor] = _activation


def _restore() -> None:
    globals().update(SCALE=2.0, TABLE=torch.ones(8), ACTIVATION=_activation)
    os.environ.pop("CONFORMANCE_SCALE", None)
    ClassAttribute.factor = 2.0
    Holder.value = 1.0
    BOX.value = 2.0


@awkward(
    "reads/global-number",
    before=_restore,
    edits=[do("rebound", lambda m: globals().update(SCALE=3.0))],
    path="openvino",
)
class GlobalNumber(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * SCALE


@awkward(
    "reads/global-tensor",
    before=_restore,
    edits=[
        do("rebound", lambda m: globals().update(TABLE=torch.full((8,), 3.0))),
        do("written", lambda m: TABLE.fill_(0.25)),
    ],
)
class GlobalTensor(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * TABLE


@awkward(
    "reads/global-function",
    before=_restore,
    edits=[do("rebound", lambda m: globals().update(ACTIVATION=torch.tanh))],
)
class GlobalFunction(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATION(self.linear(x))


@awkward(
    "reads/class-attribute",
    before=lambda: _restore(),
    edits=[do("set on the class", lambda m: setattr(type(m), "factor", 5.0))],
)
class ClassAttribute(Linear):
    factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor


class Holder:
    value = 1.0


@awkward(
    "reads/foreign-class-attribute",
    before=lambda: _restore(),
    edits=[do("set", lambda m: setattr(Holder, "value", 4.0))],
)
class ForeignClassAttribute(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + Holder.value


BOX = types.SimpleNamespace(value=2.0)


@awkward(
    "reads/global-object",
    before=lambda: _restore(),
    edits=[do("set", lambda m: setattr(BOX, "value", 4.0))],
)
class GlobalObject(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * BOX.value


def _with_closure() -> nn.Module:
    scale = 2.0

    class Closing(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * scale

        def rescale(self, value: float) -> None:
            nonlocal scale
            scale = value

    return Closing()


awkward("reads/closure", edits=[do("rebound", lambda m: m.rescale(6.0))])(_with_closure)


@awkward(
    "reads/environment",
    before=lambda: _restore(),
    edits=[do("set", lambda m: os.environ.__setitem__("CONFORMANCE_SCALE", "5"))],
)
class Environment(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * float(os.environ.get("CONFORMANCE_SCALE", "2"))


@awkward("reads/grad-mode")
class GradMode(Linear):
    """The checker calls under inference_mode and under no_grad in turns."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * 2 if torch.is_inference_mode_enabled() else y


@awkward("reads/tracing-flags")
class TracingFlags(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if (
            torch.jit.is_tracing()
            or torch.compiler.is_compiling()
            or torch.onnx.is_in_onnx_export()
        ):
            return y * 100
        return y


@awkward("reads/default-dtype", edits=[do("none", lambda m: None)])
class DefaultDtype(Linear):
    def forward(self, x: Tensor) -> Tensor:
        scale = torch.ones((), dtype=torch.get_default_dtype())
        return self.linear(x) * scale * torch.tensor(2.5)
