"""Outputs of every sort: nested, named, constants, views, the same one twice, an input itself."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from conformance.awkward.registering import awkward
from conformance.awkward.values import Linear
from conformance.drawing import draw, normal


class Result(NamedTuple):
    scores: Tensor
    hidden: tuple[Tensor, ...]
    name: str


@awkward("structures/named-tuple")
class NamedTupleOut(Linear):
    def forward(self, x: Tensor) -> Result:
        y = self.linear(x)
        return Result(y.softmax(-1), (y, y.relu()), "result")


@dataclasses.dataclass
class Detections:
    boxes: Tensor
    labels: Tensor
    extra: dict[str, Any] | None = None


@awkward("structures/dataclass")
class DataclassOut(Linear):
    def forward(self, x: Tensor) -> Detections:
        y = self.linear(x)
        return Detections(y.sigmoid(), y.argmax(-1), {"raw": y, "none": None})


@dataclasses.dataclass(slots=True, kw_only=True)
class Slotted:
    value: Tensor
    note: str = dataclasses.field(default="", compare=False)


@awkward("structures/slotted-dataclass")
class SlottedOut(Linear):
    def forward(self, x: Tensor) -> list[Slotted]:
        return [Slotted(value=self.linear(x)), Slotted(value=x + 1, note="second")]


@functools.cache
def _model_output() -> type[Any]:
    from transformers.utils import ModelOutput

    @dataclasses.dataclass
    class Output(ModelOutput):  # type: ignore[misc]
        loss: Tensor | None = None
        logits: Tensor | None = None
        hidden: tuple[Tensor, ...] | None = None

    return Output


def _with_model_output() -> nn.Module:
    output = _model_output()

    class WithModelOutput(Linear):
        def forward(self, x: Tensor) -> Any:
            y = self.linear(x)
            return output(logits=y, hidden=(y.relu(),))

    return WithModelOutput()


awkward("structures/model-output")(_with_model_output)


@awkward("structures/nested")
class NestedOut(Linear):
    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.linear(x)
        return {"a": [y, (y + 1, {"b": y.sum()})], "n": None, "t": (), "l": [], "s": "text", "i": 3}


@awkward("structures/odd-containers")
class OddContainers(Linear):
    def forward(self, x: Tensor) -> tuple[Any, ...]:
        y = self.linear(x)
        table: defaultdict[str, list[Tensor]] = defaultdict(list)
        table["y"].append(y)
        return OrderedDict(z=y, a=y + 1), table, deque([y, y * 2], maxlen=4)


class Tagged(tuple):  # type: ignore[type-arg]
    """A tuple subclass with an attribute."""


class Listed(list):  # type: ignore[type-arg]
    pass


@awkward("structures/subclasses-of-containers")
class Subclasses(Linear):
    def forward(self, x: Tensor) -> tuple[Any, Any]:
        return Tagged((self.linear(x), x.exp())), Listed([self.linear(x)])


@awkward("structures/integer-keys")
class IntegerKeys(Linear):
    def forward(self, x: Tensor) -> dict[Any, Tensor]:
        y = self.linear(x)
        return {3: y, "1": y + 1, (1, 2): y + 2, None: y + 3}


@awkward("structures/input-itself")
class InputItself(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.linear(x)


@awkward("structures/only-the-input", draw(normal("B", 8), normal("B", 8)))
class OnlyTheInput(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"second": y, "first": x}


@awkward("structures/same-twice", path="openvino")
class SameTwice(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        y = self.linear(x)
        return y, y, [y]


@awkward("structures/views-of-one-output")
class ViewsOfOneOutput(Linear):
    """Writing to one of them writes to the others."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.linear(x)
        return y, y[:, :4], y.view(-1)


@awkward("structures/split-output")
class SplitOutput(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.linear(x).split(4, dim=1)


@awkward("structures/view-of-the-input")
class ViewOfTheInput(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.t(), self.linear(x)


@awkward("structures/contiguous-input")
class ContiguousInput(Linear):
    """The input itself where it is contiguous; a dropout that does nothing gives it too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = nn.functional.dropout(x, 0.5, self.training)
        return x.contiguous(), kept, self.linear(x.to(torch.float32))


@awkward("structures/weight-out")
class WeightOut(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), self.linear.weight


@awkward("structures/buffer-out")
class BufferOut(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Any, Tensor]:
        table = self.get_buffer("table")
        return self.linear(x), table, table[:2]


@awkward("structures/constant-tensor-out")
class ConstantOut(Linear):
    """A fresh one each time: writing to it must not show in the next answer."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.linear(x), torch.arange(4), torch.ones(2, 2) * 3


@awkward("structures/expanded-output")
class ExpandedOutput(Linear):
    """Elements that share memory with one another."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sum(1, keepdim=True).expand(-1, 8)


@awkward("structures/transposed-output", draw(normal("B", 3, 8)))
class TransposedOutput(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).transpose(1, 2)


@awkward("structures/own-record")
class OwnRecord(Linear):
    """A plain object that belongs to the module, given out as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = {"a": 1}

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, int]]:
        return self.linear(x), self.settings


@awkward("structures/nothing")
class Nothing(Linear):
    def forward(self, x: Tensor) -> None:
        self.linear(x)


@awkward("structures/only-constants")
class OnlyConstantsOut(Linear):
    def forward(self, x: Tensor) -> tuple[int, str, None]:
        return 3, "text", None


@awkward("structures/module-out")
class ModuleOut(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return self.linear(x), type(self).__name__


@awkward("structures/generator-out")
class GeneratorOut(Linear):
    """Computed when asked for; the checker compares the lists made of it."""

    def _steps(self, x: Tensor) -> Iterator[Tensor]:
        for step in range(3):
            yield self.linear(x) * step

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self._steps(x))


@awkward("structures/function-out", path="eager")
class FunctionOut(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.linear(x), torch.relu


@awkward("structures/parameter-made")
class ParameterMade(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Parameter(self.linear(x), requires_grad=False)


@awkward("structures/zero-dimensions")
class ZeroDimensions(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.linear(x)
        return y.sum(), y[0, 0], y.mean().reshape(())


@awkward("structures/empty-tensors")
class EmptyTensors(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.linear(x)
        return y[:, :0], torch.empty(0), y.new_zeros(0, 4)


@awkward("structures/many")
class Many(Linear):
    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.linear(x)
        return [y * k for k in range(20)]
