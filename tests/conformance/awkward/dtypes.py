"""Types of numbers: promotion, wrapping, 0-d tensors, and dtypes that OpenVINO has not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from conformance.awkward.registering import awkward
from conformance.awkward.values import Linear
from conformance.drawing import Part, draw, integers, normal, of
from conformance.entries import call

BOOLS = of(lambda t: t > 0, normal("B", 6))
SMALL = integers(-9, 9, "B", 6)


class Apply(nn.Module):
    """A function of its arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def applied(name: str, function: Callable[..., Any], *parts: Part, **fields: Any) -> None:
    awkward(f"dtypes/{name}", draw(*parts), **fields)(lambda: Apply(function))


applied("cumsum-of-bool", lambda x: (x.cumsum(1), x.sum(), x.sum(1)), BOOLS)
applied(
    "logic", lambda x, y: (x & y, x | ~y, x ^ y, x.logical_xor(y), x.all(), x.any(1)), BOOLS, BOOLS
)
applied(
    "bool-arithmetic",
    lambda x, y: (x + y, x * y, x * 2.5, x + 3, x / y.logical_not()),
    BOOLS,
    BOOLS,
)
applied(
    "int8-wraps",
    lambda x: (x * x, x + 100, -x, x.abs()),
    integers(-128, 128, "B", 6, dtype=torch.int8),
)
applied(
    "uint8-wraps",
    lambda x: (x + 200, x - 100, -x, x * 3, ~x),
    integers(0, 256, "B", 6, dtype=torch.uint8),
)
applied(
    "int16-wraps",
    lambda x: (x * x, x << 3, x.sum()),
    integers(-30000, 30000, "B", 6, dtype=torch.int16),
)
applied(
    "int32-wraps",
    lambda x: (x * x, x + 2**31 - 1, x.sum()),
    integers(-(2**31), 2**31, "B", 6, dtype=torch.int32),
)
applied(
    "int64-past-int32",
    lambda x: (x * 3, x + 1, x // 7, x % 1000, x.sum(1)),
    integers(2**33, 2**40, "B", 6),
)
applied(
    "int64-as-float", lambda x: (x.float(), x.double() + 0.5, x / 3), integers(2**50, 2**60, "B", 6)
)
applied("floor-division", lambda x: (x // 3, x // -2, -x // 4, x % 3, x % -3, x.fmod(3)), SMALL)
applied(
    "floor-division-of-floats",
    lambda x: (x // 0.3, x % 0.3, x.fmod(0.3), x // -0.7),
    normal("B", 6),
)
applied(
    "division-modes",
    lambda x: (
        torch.div(x, 3, rounding_mode="trunc"),
        torch.div(x, 3, rounding_mode="floor"),
        torch.div(x, 3),
        torch.remainder(x, -4),
        torch.true_divide(x, 2),
    ),
    SMALL,
)
applied(
    "divided-by-zero",
    lambda x, y: x // y,
    SMALL,
    integers(1, 5, "B", 6),
    others={
        "refused": lambda: call(torch.ones(2, 6, dtype=torch.int64), torch.zeros(2, 6).long()),
    },
)
applied(
    "powers",
    lambda x: (x**2, x**3, 2 ** x.abs(), x.pow(0), x.float() ** 0.5, (-x).float() ** 2),
    SMALL,
)
applied("negative-power", lambda x: (x.float() ** -1, 2.0**-x), integers(1, 5, "B", 6))
applied("bits", lambda x: (x & 6, x | 1, x ^ 5, ~x, x << 2, x >> 1), SMALL)
applied(
    "promotion",
    lambda x, y, z: (x + y, x * 2.5, x + z, y + z, z + 1, x.half() * y, x / 2),
    SMALL,
    integers(-5, 5, "B", 6, dtype=torch.int32),
    normal("B", 6),
)
applied(
    "promotion-of-0-d",
    lambda x, s: (x + s, x * s.double(), x.int() * s, s.int() + x.short()),
    normal("B", 6),
    normal(),
)
applied(
    "in-place-comparison",
    lambda x: (x.clone().gt_(0), x.clone().eq_(x), (x > 0).float().le_(0)),
    normal("B", 6),
)
applied(
    "in-place-keeps-dtype",
    lambda x: (x.clone().add_(2), x.clone().mul_(True), x.int().add_(3)),
    normal("B", 6),
)
applied(
    "in-place-refused",
    lambda x, y: x.add_(y),
    SMALL,
    SMALL,
    others={
        "refused": lambda: call(torch.ones(2, 6, dtype=torch.int64), torch.rand(2, 6)),
    },
)
applied(
    "sums",
    lambda x, y: (x.sum(), x.prod(1), y.sum(0), x.to(torch.uint8).sum(), y.float().sum()),
    SMALL,
    integers(0, 3, "B", 6, dtype=torch.int32),
)
applied(
    "mean-of-integers",
    lambda x: x.mean(),
    normal("B", 6),
    others={
        "refused": lambda: call(torch.ones(2, 6, dtype=torch.int64)),
    },
)
applied(
    "casts",
    lambda x: (
        (x * 3).int(),
        x.long(),
        x.bool(),
        x.half().float(),
        x.to(torch.int16),
    ),
    normal("B", 6),
)
applied(
    "casts-out-of-range",
    lambda x: x.to(torch.int32),
    normal("B", 6, scale=10.0),
    others={
        "special": lambda: call(
            torch.tensor([[float("nan"), float("inf"), -float("inf"), 1e20, 0, 1]])
        ),
    },
)
applied("casts-to-int8", lambda x: (x * 100).to(torch.int8), normal("B", 6))
applied("cumprod-of-bool", lambda x: x.cumprod(1), BOOLS)
applied("casts-to-unsigned", lambda x: x.to(torch.uint8), normal("B", 6, scale=50.0))
applied(
    "indices",
    lambda x: (x.argmax(1), x.argmin(), x.argsort(1), x.max(1)),
    normal("B", 6),
)
applied(
    "unsigned-16",
    lambda x: (x.to(torch.int32) + 1, x),
    of(lambda t: t.to(torch.uint16), integers(0, 60000, "B", 6)),
)
applied(
    "float64",
    lambda x: (x * 1e-9 + 1, x.sum(), x.exp()),
    normal("B", 6, dtype=torch.float64),
    path="eager",
)
applied("float64-inside", lambda x: ((x.double() * 1e-9 + 1 - 1) * 1e9).float(), normal("B", 6))
applied("float16", lambda x: (x * 3, x.softmax(-1), x.sum()), normal("B", 6, dtype=torch.float16))
applied(
    "float16-overflows",
    lambda x: (x * 60000, (x * 60000).float()),
    normal("B", 6, dtype=torch.float16),
)
applied("bfloat16", lambda x: (x + 1, x.exp(), x.float()), normal("B", 6, dtype=torch.bfloat16))
applied("bfloat16-rounded", lambda x: x.bfloat16().float(), normal("B", 6))
applied("float8-rounded", lambda x: x.to(torch.float8_e4m3fn).float(), normal("B", 6))
applied(
    "complex-inside",
    lambda x: torch.view_as_real(torch.complex(x, x * 2) ** 2).sum(-1),
    normal("B", 6),
)
applied("complex-out", lambda x: torch.polar(x.abs(), x), normal("B", 6))
applied(
    "complex-in",
    lambda x: (x.real, x.abs(), x.conj().imag),
    normal("B", 6, dtype=torch.complex64),
    path="eager",
)
applied(
    "0-d-in",
    lambda x, n: (x + n, x[n.abs() % 6 :] if False else x, n * 2, n.float()),
    normal("B", 6),
    integers(-3, 3),
)
applied(
    "0-d-int-with-float",
    lambda x: (x + torch.tensor(2), x * torch.tensor(2.5).double()),
    normal("B", 6),
)
applied(
    "factories",
    lambda x: (
        torch.arange(5),
        torch.arange(0, 1, 0.25),
        torch.full((2,), 3),
        torch.full((2,), 3.0),
        torch.tensor([1, 2]),
        torch.tensor([True]),
        torch.zeros(2),
        x.new_ones(2, dtype=torch.int16),
        torch.zeros_like(x, dtype=torch.bool),
        torch.eye(3),
        torch.empty(0, dtype=torch.int32),
    ),
    normal("B", 6),
)
applied(
    "where-promotes",
    lambda x, y: (
        torch.where(x > 0, x, 0),
        torch.where(x > 0, 1, 0),
        torch.where(x > 0, 1.5, y),
        torch.where(y > 0, y, x),
    ),
    normal("B", 6),
    SMALL,
)
applied(
    "clamped-integers",
    lambda x: (x.clamp(0), x.clamp(max=2), x.clamp(-1.5, 1.5), x.clip(min=x[:1])),
    SMALL,
)
applied(
    "dtype-as-branch",
    lambda x: x * 2 if x.dtype == torch.float32 else x * 3,
    normal("B", 6),
    others={
        "double": lambda: call(torch.ones(2, 6, dtype=torch.float64)),
        "half": lambda: call(torch.ones(2, 6, dtype=torch.float16)),
        "integers": lambda: call(torch.ones(2, 6, dtype=torch.int32)),
        "bool": lambda: call(torch.ones(2, 6, dtype=torch.bool)),
    },
)


@awkward(
    "dtypes/other-inputs",
    others={
        "double": lambda: call(torch.randn(2, 8, dtype=torch.float64)),
        "half": lambda: call(torch.randn(2, 8).half()),
        "integers": lambda: call(torch.ones(2, 8, dtype=torch.int64)),
        "complex": lambda: call(torch.ones(2, 8, dtype=torch.complex64)),
        "sparse": lambda: call(torch.eye(8).to_sparse()),
        "meta": lambda: call(torch.ones(2, 8, device="meta")),
        "subclass": lambda: call(torch.ones(2, 8).as_subclass(Subclass)),
        "an array": lambda: call([[1.0] * 8]),
        "none": lambda: call(None),
        "again": lambda: call(torch.ones(2, 8)),
    },
    path="openvino",
)
class OtherInputs(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Subclass(torch.Tensor):
    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()


@awkward("dtypes/double-module", draw(normal("B", 8, dtype=torch.float64)), path="eager")
def _double_module() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double()


@awkward("dtypes/half-module", draw(normal("B", 8, dtype=torch.float16)))
def _half_module() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh()).half()


@awkward("dtypes/bfloat16-module", draw(normal("B", 8, dtype=torch.bfloat16)))
def _bfloat16_module() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()).bfloat16()


@awkward("dtypes/mixed-module", tolerance=0.03)
class MixedModule(nn.Module):
    """The first layer in bfloat16, the second in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8).bfloat16()
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.bfloat16()).float())


@awkward("dtypes/autocast-inside")
class AutocastInside(Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.linear(x)


@awkward("dtypes/quantized-layer")
class QuantizedLayer(nn.Module):
    """Weights in int8, scaled by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-128, 128, (8, 8), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(8, 1) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.get_buffer("weight").float() * self.get_buffer("scale")
        return x @ weight.t()


@awkward("dtypes/packed-nibbles")
class PackedNibbles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", torch.randint(0, 256, (8, 4), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        packed = self.get_buffer("packed")
        weight = torch.stack([packed & 15, packed >> 4], -1).view(8, 8).to(torch.int8) - 8
        return x @ weight.float().t()
