"""Arguments that are containers, records, views and objects."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from conformance.awkward.registering import awkward
from conformance.awkward.values import Linear
from conformance.drawing import draw, integers, normal, of
from conformance.entries import call

X = normal("B", 8)


def x(batch: int = 2) -> Tensor:
    return torch.randn(batch, 8)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor
    scale: float = 1.0


Plain = namedtuple("Plain", "left right")


@dataclasses.dataclass
class Batch:
    x: Tensor
    y: Tensor | None = None
    name: str = "batch"


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    scale: float


@awkward(
    "signatures/named-tuple",
    draw(of(lambda a, b: Pair(a, b), X, X)),
    others={
        "another scale": lambda: call(Pair(x(), x(), 3.0)),
        "a tuple": lambda: call((x(), x(), 1.0)),
        "another class": lambda: call(Plain(x(), x())),
    },
)
class NamedTupleArgument(Linear):
    def forward(self, pair: Pair) -> Pair:
        return Pair(self.linear(pair.first), pair.second * 2, pair.scale)


@awkward(
    "signatures/dataclass",
    draw(of(lambda a, b: Batch(a, b), X, X)),
    others={
        "without": lambda: call(Batch(x())),
        "another name": lambda: call(Batch(x(), x(), "other")),
        "frozen": lambda: call(Frozen(x(), 2.0)),
    },
)
class DataclassArgument(Linear):
    def forward(self, batch: Batch) -> Batch:
        if batch.y is None:
            return Batch(self.linear(batch.x))
        return Batch(self.linear(batch.x), batch.y + 1, batch.name + "!")


@awkward(
    "signatures/frozen-dataclass",
    draw(of(lambda a: Frozen(a, 2.0), X)),
    others={
        "another scale": lambda: call(Frozen(x(), 3.0)),
    },
)
class FrozenDataclass(Linear):
    def forward(self, given: Frozen) -> Frozen:
        return dataclasses.replace(given, x=self.linear(given.x) * given.scale)


@awkward(
    "signatures/nested",
    draw(of(lambda a, b, c: {"a": [a, (b,)], "c": {"d": c, "e": None}}, X, X, X)),
    others={
        "longer": lambda: call({"a": [x(), (x(), x())], "c": {"d": x(), "e": None}}),
        "another order": lambda: call({"c": {"e": None, "d": x()}, "a": [x(), (x(),)]}),
        "given": lambda: call({"a": [x(), (x(),)], "c": {"d": x(), "e": x()}}),
        "a tuple": lambda: call({"a": (x(), (x(),)), "c": {"d": x(), "e": None}}),
    },
    path="openvino",
)
class Nested(Linear):
    def forward(self, tree: dict[str, Any]) -> Tensor:
        first, rest = tree["a"]
        y = self.linear(first) + sum(rest) + tree["c"]["d"]
        return y if tree["c"]["e"] is None else y * tree["c"]["e"]


@awkward(
    "signatures/ordered-dict",
    draw(of(lambda a, b: OrderedDict(b=b, a=a), X, X)),
    others={
        "another order": lambda: call(OrderedDict(a=x(), b=x())),
        "a dict": lambda: call({"b": x(), "a": x()}),
        "more": lambda: call(OrderedDict(b=x(), a=x(), c=x())),
    },
)
class OrderedArgument(Linear):
    """What it computes depends on the order."""

    def forward(self, parts: dict[str, Tensor]) -> Tensor:
        total = torch.zeros(8)
        for name in parts:
            total = self.linear(total + parts[name])
        return total


@awkward(
    "signatures/list-of-any-length",
    draw(of(lambda *t: list(t), X, X)),
    others={
        "one": lambda: call([x()]),
        "four": lambda: call([x(), x(), x(), x()]),
        "none": lambda: call([]),
    },
)
class ListOfAnyLength(Linear):
    def forward(self, parts: list[Tensor]) -> Tensor:
        return torch.stack([self.linear(part) for part in parts]).sum(0)


@awkward(
    "signatures/same-tensor-twice",
    draw(of(lambda a: [a, a], X)),
    others={
        "two": lambda: call([x(), x()]),
    },
)
class SameTensorTwice(Linear):
    def forward(self, pair: list[Tensor]) -> Tensor:
        y = self.linear(pair[0])
        return y if pair[0] is pair[1] else y * pair[1]


@awkward("signatures/views-of-one", draw(of(lambda a: (a[:, :8], a[:, 4:]), normal("B", 12))))
class ViewsOfOne(Linear):
    """Arguments that overlap in memory."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.linear(pair[0]) * pair[1]


@awkward(
    "signatures/layouts",
    draw(normal("B", 8, 6)),
    others={
        "transposed": lambda: call(torch.randn(2, 6, 8).transpose(1, 2)),
        "expanded": lambda: call(torch.randn(2, 1, 6).expand(2, 8, 6)),
        "sliced": lambda: call(torch.randn(4, 8, 12)[::2, :, ::2]),
        "offset": lambda: call(torch.randn(3, 8, 6)[1:]),
        "flipped": lambda: call(torch.randn(2, 8, 6).flip(0)),
        "parameter": lambda: call(nn.Parameter(torch.randn(2, 8, 6))),
        "requires grad": lambda: call(torch.randn(2, 8, 6, requires_grad=True)),
    },
    path="openvino",
)
class Layouts(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(1, 2))


@awkward(
    "signatures/strides-read",
    draw(normal("B", 8, 6)),
    others={
        "transposed": lambda: call(torch.randn(2, 6, 8).transpose(1, 2)),
    },
)
class StridesRead(nn.Module):
    """Eager's answer, or its refusal, depends on the strides."""

    def forward(self, x: Tensor) -> tuple[Tensor, bool]:
        return x.view(x.shape[0], -1) + 1, x.is_contiguous()


@awkward("signatures/array", draw(of(lambda t: t.numpy(), X)))
class ArrayArgument(Linear):
    def forward(self, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return self.linear(torch.from_numpy(x)).numpy()


class Opaque:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@awkward("signatures/object", draw(of(Opaque, X)))
class ObjectArgument(Linear):
    def forward(self, held: Opaque) -> Opaque:
        return Opaque(self.linear(held.tensor))


@awkward(
    "signatures/ids-or-embeddings",
    draw(integers(0, 10, "B", 4)),
    others={
        "embeddings": lambda: call(None, torch.randn(2, 4, 8)),
        "by name": lambda: call(embeddings=torch.randn(2, 4, 8)),
        "both": lambda: call(torch.ones(2, 4, dtype=torch.long), torch.randn(2, 4, 8)),
        "int32": lambda: call(torch.ones(2, 4, dtype=torch.int32)),
        "floats": lambda: call(torch.ones(2, 4)),
    },
)
class IdsOrEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)

    def forward(self, ids: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        if (ids is None) == (embeddings is None):
            raise ValueError("exactly one of ids and embeddings")
        return (self.table(ids) if embeddings is None else embeddings).sum(1)
