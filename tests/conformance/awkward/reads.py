"""What forward reads beside its arguments, changed between calls: the next answer is eager's."""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance.awkward.editing import do, put, written
from conformance.awkward.registering import awkward
from conformance.awkward.values import Linear


@awkward("reads/attribute", edits=[put("k", 3.0), put("k", -1.0)], path="openvino")
class Attribute(Linear):
    k = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.k


@awkward("reads/attribute-of-submodule", edits=[put("norm.eps", 0.5)], path="openvino")
class AttributeOfSubmodule(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


@dataclasses.dataclass
class Config:
    scale: float = 2.0
    act: str = "relu"
    inner: Any = None


@awkward(
    "reads/config-object",
    edits=[
        put("config.scale", 5.0),
        put("config.act", "gelu"),
        put("config.inner.scale", 7.0),
        put("config", lambda: Config(1.0, "tanh", Config(1.5))),
    ],
    path="openvino",
)
class ConfigObject(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config(inner=Config())

    def forward(self, x: Tensor) -> Tensor:
        act = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}[self.config.act]
        return act(self.linear(x)) * self.config.scale + self.config.inner.scale


@awkward(
    "reads/list-attribute",
    edits=[
        do("item set", lambda m: m.scales.__setitem__(0, 4.0)),
        do("item appended", lambda m: m.scales.append(0.5)),
        do("list cleared", lambda m: m.scales.clear()),
    ],
    path="openvino",
)
class ListAttribute(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.scales = [1.0, 2.0]

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        for scale in self.scales:
            y = torch.tanh(y * scale)
        return y


@awkward(
    "reads/dict-attribute",
    edits=[
        do("item set", lambda m: m.table.__setitem__("scale", 4.0)),
        do("item added", lambda m: m.table.__setitem__("shift", 1.0)),
        do("nested", lambda m: m.table["inner"].__setitem__("k", 9.0)),
    ],
)
class DictAttribute(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.table: dict[str, Any] = {"scale": 2.0, "inner": {"k": 1.0}}

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) * self.table["scale"] + self.table.get("shift", 0.0)
        return y * self.table["inner"]["k"]


@awkward("reads/set-attribute", edits=[do("added", lambda m: m.on.add("square"))])
class SetAttribute(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.on = {"relu"}

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y = F.relu(y) if "relu" in self.on else y
        return y * y if "square" in self.on else y


@awkward("reads/property", edits=[put("base", 4.0)], path="openvino")
class Property(Linear):
    base = 2.0

    @property
    def scale(self) -> float:
        return self.base**2

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


@awkward(
    "reads/tensor-attribute",
    edits=[
        put("table", lambda: torch.full((8,), 2.0)),
        do("written", lambda m: m.table.fill_(0.5)),
        do("of another shape", lambda m: setattr(m, "table", torch.full((1,), 3.0))),
    ],
    path="openvino",
)
class TensorAttribute(Linear):
    """Neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.table


@awkward(
    "reads/tensors-in-a-list",
    edits=[
        do("replaced", lambda m: m.tables.__setitem__(0, torch.full((8,), 2.0))),
        do("written", lambda m: m.tables[1].fill_(0.5)),
    ],
)
class TensorsInList(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.tables = [torch.ones(8), torch.ones(8)]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.tables[0] + self.tables[1]


@awkward(
    "reads/modules-in-a-list",
    edits=[do("weight written", lambda m: written(m.layers[0].weight))],
)
class ModulesInList(Linear):
    """Not registered: a plain list of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(8, 8).requires_grad_(False)]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](self.linear(x))


@awkward("reads/numpy-attribute", edits=[do("written", lambda m: m.table.fill(3.0))])
class NumpyAttribute(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.table = np.ones(8, dtype=np.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * torch.from_numpy(self.table)


class Kind(enum.Enum):
    RELU = "relu"
    TANH = "tanh"


@awkward("reads/enum-attribute", edits=[do("set", lambda m: setattr(m, "kind", Kind.TANH))])
class EnumAttribute(Linear):
    kind = Kind.RELU

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y.relu() if self.kind is Kind.RELU else y.tanh()


@awkward(
    "reads/function-attribute",
    edits=[do("set", lambda m: setattr(m, "act", torch.tanh))],
    path="openvino",
)
class FunctionAttribute(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.act = torch.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))


@awkward(
    "reads/partial-attribute",
    edits=[
        do("set", lambda m: setattr(m, "act", functools.partial(F.leaky_relu, negative_slope=0.5)))
    ],
)
class PartialAttribute(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.act = functools.partial(F.leaky_relu, negative_slope=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))


def _double(self: Any, x: Tensor) -> Tensor:
    return self.linear(x) * 2


@awkward(
    "reads/patched-method",
    edits=[do("patched", lambda m: setattr(m, "compute", types.MethodType(_double, m)))],
)
class PatchedMethod(Linear):
    def compute(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


@awkward("reads/getattr", edits=[put("values_", lambda: {"gain": 4.0})])
class GetAttr(Linear):
    """Attributes made up on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.values_ = {"gain": 2.0}

    def __getattr__(self, name: str) -> Any:
        if name == "gain":
            return self.__dict__["values_"]["gain"]
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gain


@awkward(
    "reads/tied-weights",
    edits=[
        do("untied", lambda m: setattr(m.out, "weight", nn.Parameter(torch.eye(8)))),
    ],
    path="openvino",
)
class TiedWeights(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8, bias=False)
        self.out.weight = self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.linear(x).relu())


@awkward("reads/number-subclass", edits=[put("k", lambda: Degrees(90.0))])
class NumberSubclass(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.k = Degrees(180.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.k.radians()


class Degrees(float):
    def radians(self) -> float:
        return self * 0.017453292519943295
