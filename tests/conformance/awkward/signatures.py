"""Arguments of every sort: optional, named, variable, constants that choose, and ones ignored."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conformance.awkward.registering import awkward
from conformance.awkward.values import Linear
from conformance.drawing import constant, draw, normal
from conformance.entries import call

X = normal("B", 8)


def x(batch: int = 2) -> Tensor:
    return torch.randn(batch, 8)


@awkward(
    "signatures/keywords",
    draw(X, scale=constant(2.0), other=X),
    others={
        "another order": lambda: call(x(), other=x(), scale=2.0),
        "positional": lambda: call(x(), 2.0, x()),
        "another constant": lambda: call(x(), scale=3.0, other=x()),
        "an integer": lambda: call(x(), scale=3, other=x()),
        "true": lambda: call(x(), scale=True, other=x()),
        "left out": lambda: call(x(), other=x()),
        "all by name": lambda: call(other=x(), scale=2.0, x=x()),
        "unknown": lambda: call(x(), other=x(), unknown=1),
        "missing": lambda: call(x()),
    },
    path="openvino",
)
class Keywords(Linear):
    def forward(self, x: Tensor, scale: float = 1.0, *, other: Tensor) -> Tensor:
        return self.linear(x) * scale + other


@awkward(
    "signatures/variable",
    draw(X, X, a=X, b=X),
    others={
        "one": lambda: call(x()),
        "three": lambda: call(x(), x(), x(), a=x()),
        "other names": lambda: call(x(), b=x(), c=x()),
        "none": lambda: call(),
    },
)
class Variable(Linear):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        total = self.linear(sum(args))  # type: ignore[arg-type]
        return {name: total * value for name, value in kwargs.items()} | {"total": total}


@awkward(
    "signatures/optional",
    draw(X, constant(None)),
    others={
        "given": lambda: call(x(), x()),
        "left out": lambda: call(x()),
        "by name": lambda: call(x(), bias=x()),
        "a number": lambda: call(x(), 2.0),
    },
    path="openvino",
)
class Optional(Linear):
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.linear(x)
        return y if bias is None else y + bias


@awkward(
    "signatures/text",
    draw(X, constant("relu")),
    others={
        "another": lambda: call(x(), "tanh"),
        "unknown": lambda: call(x(), "nothing"),
        "bytes": lambda: call(x(), b"relu"),
    },
)
class Text(Linear):
    def forward(self, x: Tensor, act: str) -> Tensor:
        return getattr(torch, act)(self.linear(x))


class Mode(enum.Enum):
    PLAIN = 1
    SQUARED = 2


class Flags(enum.IntFlag):
    NONE = 0
    NEGATED = 1


@awkward(
    "signatures/enum",
    draw(X, constant(Mode.PLAIN), flags=constant(Flags.NONE)),
    others={
        "another": lambda: call(x(), Mode.SQUARED),
        "a flag": lambda: call(x(), Mode.PLAIN, flags=Flags.NEGATED),
        "its number": lambda: call(x(), Mode.PLAIN, flags=1),
    },
)
class EnumArgument(Linear):
    def forward(self, x: Tensor, mode: Mode, flags: Flags = Flags.NONE) -> Tensor:
        y = self.linear(x)
        y = y * y if mode is Mode.SQUARED else y
        return -y if flags & Flags.NEGATED else y


@awkward(
    "signatures/numbers",
    draw(X, constant(2), constant(0.5)),
    others={
        "others": lambda: call(x(), 3, 0.25),
        "one": lambda: call(x(), 1, 1.0),
        "zero": lambda: call(x(), 0, 0.0),
        "minus zero": lambda: call(x(), 2, -0.0),
        "negative": lambda: call(x(), -1, -2.5),
        "not a number": lambda: call(x(), 2, float("nan")),
        "large": lambda: call(x(), 2**40, 1e30),
        "true": lambda: call(x(), True, False),
        "numpy": lambda: call(x(), np.int64(3), np.float32(0.5)),
    },
)
class Numbers(Linear):
    def forward(self, x: Tensor, n: int, scale: float) -> tuple[Tensor, Any]:
        return self.linear(x) * n + scale, n * scale


@awkward(
    "signatures/many-numbers",
    draw(X, constant(0)),
    others={f"step {n}": lambda n=n: call(x(), n) for n in range(1, 13)},
)
class ManyNumbers(Linear):
    """As a step of a diffusion: a number that is never twice the same."""

    def forward(self, x: Tensor, step: int) -> Tensor:
        return self.linear(x) * (1.0 - step / 50)


@awkward(
    "signatures/special-constants",
    draw(X, constant(torch.float32), constant(slice(0, 4)), constant(...)),
    others={
        "another dtype": lambda: call(x(), torch.int32, slice(0, 4), ...),
        "another slice": lambda: call(x(), torch.float32, slice(2, None, 2), ...),
        "a number": lambda: call(x(), torch.float32, 3, 0),
    },
)
class SpecialConstants(Linear):
    def forward(self, x: Tensor, dtype: torch.dtype, part: slice, dots: Any) -> Tensor:
        return self.linear(x)[dots, part].to(dtype)


@awkward(
    "signatures/function",
    draw(X, constant(torch.relu)),
    others={
        "another": lambda: call(x(), torch.tanh),
        "a lambda": lambda: call(x(), lambda y: y + 1),
        "a module": lambda: call(x(), nn.Softmax(-1)),
    },
)
class Function(Linear):
    def forward(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        return act(self.linear(x))


@awkward(
    "signatures/ignored",
    draw(X, normal("B", 3), constant("anything"), extra=X),
    others={
        "another type": lambda: call(x(), None, 3, extra="text"),
        "another rank": lambda: call(x(), torch.randn(2), "anything", extra=x(5)),
    },
)
class Ignored(Linear):
    def forward(self, x: Tensor, unused: Any, also: Any, extra: Any = None) -> Tensor:
        return self.linear(x)


@awkward("signatures/no-argument", draw())
class NoArgument(Linear):
    def forward(self) -> Tensor:
        return self.linear(self.linear.weight)


@awkward(
    "signatures/only-constants",
    draw(constant(3)),
    batches=(),
    others={
        "another": lambda: call(5),
    },
)
class OnlyConstants(Linear):
    def forward(self, n: int) -> Tensor:
        return self.linear(torch.arange(n * 8.0).view(n, 8))
