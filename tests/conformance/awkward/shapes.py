"""What runs, or a number in it, depends on the sizes of the inputs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance.awkward.registering import awkward, sequences
from conformance.awkward.values import Linear
from conformance.drawing import draw, integers, normal
from conformance.entries import call


@awkward("shapes/branch-on-batch")
class BranchOnBatch(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            return self.linear(x) * 3
        return self.linear(x)


@sequences("shapes/branch-on-length")
class BranchOnLength(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.size(1) > 6:
            return self.linear(x[:, :6])
        return self.linear(x) + 1


@sequences("shapes/loop-over-length")
class LoopOverLength(Linear):
    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            state = torch.tanh(self.linear(x[:, t]) + state)
        return state


@sequences("shapes/unbind-loop")
class UnbindLoop(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.linear(step) for step in x.unbind(1)], 1)


@sequences("shapes/square-root-of-length", path="openvino")
class SquareRoot(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) / math.sqrt(x.shape[1])


@sequences("shapes/arithmetic")
class Arithmetic(Linear):
    def forward(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        half = (L + 1) // 2
        return self.linear(x)[:, :half].reshape(B, half * D) * (L % 3 + 1) + B / L


@sequences("shapes/logarithm-of-length")
class Logarithm(Linear):
    def forward(self, x: Tensor) -> Tensor:
        scale = math.log(x.shape[1] + 1) ** 0.5 + round(x.shape[1] * 0.3) + math.ceil(L_RATIO / 2)
        return self.linear(x) * scale


L_RATIO = 3


@sequences("shapes/causal-mask", path="openvino")
class CausalMask(Linear):
    def forward(self, x: Tensor) -> Tensor:
        L = x.shape[1]
        allowed = torch.ones(L, L, dtype=torch.bool).tril()
        scores = x @ self.linear(x).transpose(1, 2)
        return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ x


@sequences("shapes/positions", path="openvino")
class Positions(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.positions(torch.arange(x.shape[1], device=x.device))


@sequences("shapes/table-too-short", lengths=(4, 7, 6, 1))
class TableTooShort(Linear):
    """Eager raises IndexError beyond 6 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.positions(torch.arange(x.shape[1]))


@sequences("shapes/slice-of-table")
class SliceOfTable(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(1, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.get_buffer("table")[:, : x.size(1)]


@sequences("shapes/grown-cache")
class GrownCache(Linear):
    """Keeps what it computed for the longest input so far."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.zeros(0, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[0] < x.shape[1]:
            steps = torch.arange(x.shape[1], dtype=torch.float32)
            self.table = torch.sin(steps[:, None] / torch.arange(1, 9))
        return self.linear(x) + self.table[: x.shape[1]]


@sequences("shapes/odd-or-even")
class OddOrEven(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2:
            x = F.pad(x, (0, 0, 0, 1))
        return self.linear(x).view(x.shape[0], -1, 2, 8).mean(2)


@sequences("shapes/chunks", lengths=(4, 6, 8, 2), size=(2, 4))
class Chunks(Linear):
    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linear(x).chunk(2, dim=1)
        return first * second.sigmoid()


@sequences("shapes/chunks-uneven")
class ChunksUneven(Linear):
    """How many there are depends on the length."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part.sum(1) for part in self.linear(x).chunk(3, dim=1)]


@sequences("shapes/windows", lengths=(4, 8, 12), size=(2, 8))
class Windows(Linear):
    def forward(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        windows = x.view(B, L // 4, 4, D)
        return (windows @ self.linear(windows).transpose(-1, -2)).reshape(B, L, 4)


@sequences("shapes/rolled-windows")
class RolledWindows(Linear):
    def forward(self, x: Tensor) -> Tensor:
        shift = x.shape[1] // 2
        return self.linear(x.roll(-shift, 1)).roll(shift, 1).flip(0)


@sequences("shapes/unfold", lengths=(4, 7, 9))
class Unfold(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).unfold(1, 3, 2).sum(-1)


@sequences("shapes/last-three", lengths=(4, 7, 2, 1))
class LastThree(Linear):
    """Fewer where there are fewer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[:, -3:]


@sequences("shapes/strided-slice")
class StridedSlice(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[:, 1::2] if x.shape[1] > 1 else self.linear(x)


@sequences("shapes/sizes-out")
class SizesOut(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, int, torch.Size, list[int]]:
        return self.linear(x), x.shape[0] * x.shape[1], x.shape, [x.numel(), x.dim()]


@sequences("shapes/size-as-tensor")
class SizeAsTensor(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x) * torch.tensor(x.shape[1]), torch.tensor(x.shape)


@sequences("shapes/mean-by-hand", path="openvino")
class MeanByHand(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sum(1) / x.size(1) + x.numel() / len(x)


@sequences("shapes/linspace")
class Linspace(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * torch.linspace(0.0, 1.0, x.shape[1])[None, :, None]


@sequences("shapes/size-in-dict")
class SizeInDict(Linear):
    """Behaviour looked up by length, with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = {5: 2.0, 7: 3.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scales.get(x.shape[1], 1.0)


@awkward("shapes/two-that-broadcast", draw(normal("B", 8), normal(1, 8)))
class TwoThatBroadcast(Linear):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x) + y


@awkward(
    "shapes/two-batches",
    draw(normal("B", 8), normal("B", 8)),
    others={
        "second of one": lambda: call(torch.randn(3, 8), torch.randn(1, 8)),
        "first of one": lambda: call(torch.randn(1, 8), torch.randn(3, 8)),
        "unequal": lambda: call(torch.randn(2, 8), torch.randn(3, 8)),
    },
)
class TwoBatches(Linear):
    """Eager refuses unequal ones and broadcasts one of 1."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x) * y


@awkward(
    "shapes/table-of-six",
    size=(6, 5),
    batches=(6, 1),
    others={"three": lambda: call(torch.randn(3, 8))},
)
class TableOfSix(Linear):
    """Takes batches of 6 and of 1; eager refuses others."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.get_buffer("table")


@awkward(
    "shapes/batch-into-features",
    batches=(2,),
    others={
        "refused": lambda: call(torch.randn(3, 8)),
    },
)
class BatchIntoFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.reshape(-1))


@awkward(
    "shapes/empty-batch",
    path="openvino",
    others={"none": lambda: call(torch.randn(0, 8)), "again": lambda: call(torch.randn(2, 8))},
)
class EmptyBatch(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        return y, y.sum(0)


@awkward("shapes/empty-example", size=(0, 5), batches=(0, 1, 3))
class EmptyExample(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


@awkward("shapes/mean-of-nothing", others={"none": lambda: call(torch.randn(0, 8))})
class MeanOfNothing(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).mean(0)


@awkward("shapes/max-of-nothing", others={"none": lambda: call(torch.randn(0, 8))})
class MaxOfNothing(Linear):
    """Eager raises for an empty batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).max()


@sequences(
    "shapes/other-ranks",
    others={
        "vector": lambda: call(torch.randn(8)),
        "matrix": lambda: call(torch.randn(3, 8)),
        "four": lambda: call(torch.randn(2, 3, 4, 8)),
    },
)
class OtherRanks(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).flatten(0, -2) if x.dim() > 2 else self.linear(x)


@awkward("shapes/scalar-input", draw(normal()), batches=(), path="either")
class ScalarInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.weight, x.exp()


@awkward(
    "shapes/smaller-than-kernel",
    draw(normal("B", 3, 8, 8)),
    others={
        "too small": lambda: call(torch.randn(2, 3, 4, 4)),
        "too few channels": lambda: call(torch.randn(2, 2, 8, 8)),
        "other sizes": lambda: call(torch.randn(2, 3, 9, 7)),
    },
)
class SmallerThanKernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@awkward(
    "shapes/pooled-to-nothing",
    draw(normal("B", 3, 8, 8)),
    others={"too small": lambda: call(torch.randn(2, 3, 3, 3))},
)
class PooledToNothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.avg_pool2d(x, 2), 2)


@awkward("shapes/wrong-features", others={"refused": lambda: call(torch.randn(2, 9))})
class WrongFeatures(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@sequences("shapes/expanded-mask", redraw=draw(normal("B", "L", 8), integers(0, 2, "B", "L")))
class ExpandedMask(nn.Module):
    """A float mask, expanded, into attention: what the CPU plugin once computed wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        B, L, _ = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, 2, 4).permute(2, 0, 3, 1, 4)
        bias = (1.0 - allowed[:, None, None, :].float()) * -1e4
        bias = bias.expand(B, 1, L, L)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return y.transpose(1, 2).reshape(B, L, 8)
