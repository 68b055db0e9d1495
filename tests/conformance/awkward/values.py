"""What runs, or how large it gets, depends on the values of the inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from conformance.awkward.registering import awkward, sequences
from conformance.drawing import draw, integers, lengths, normal
from conformance.entries import call


class Linear(nn.Module):
    """The common part: something to compute around the trap."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)


@awkward("values/branch-on-sum", path="eager", seeds=6)
class BranchOnSum(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.linear(x)
        return self.linear(-x) * 2


@awkward(
    "values/rare-branch",
    path="eager",
    others={"the rare one": lambda: call(torch.full((2, 8), 100.0))},
)
class RareBranch(Linear):
    """No draw of the example's distribution ever takes it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if x.abs().max() > 50:
            return y.clamp(-1, 1)
        return y


@awkward("values/item-as-factor", path="eager", seeds=4)
class ItemAsFactor(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * x.max().item()


@awkward("values/float-of-tensor", path="eager")
class FloatOfTensor(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) / (1.0 + abs(float(x[0, 0])))


@awkward("values/int-as-slice", draw(normal("B", 8), integers(1, 8)), path="eager", seeds=5)
class IntAsSlice(Linear):
    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        return self.linear(x)[:, : int(n)]


@awkward("values/while-on-tensor", path="eager", seeds=4)
class WhileOnTensor(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        while y.norm() > 1:
            y = y * 0.7
        return y


@awkward("values/numpy-escape", path="eager")
class NumpyEscape(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + torch.from_numpy(x.detach().numpy() * 2)


@awkward("values/tolist", path="eager")
class ToList(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + sum(x[0].tolist())


@awkward("values/list-of-floats-out", path="eager")
class FloatsOut(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, list[float]]:
        return self.linear(x), x[0].tolist()


@awkward("values/nonzero")
class Nonzero(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nonzero(self.linear(x) > 0)


@awkward("values/where-one-argument")
class WhereOne(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.where(x > 0)


@awkward("values/boolean-index")
class BooleanIndex(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[x > 0]


@awkward("values/boolean-index-rows")
class BooleanRows(Linear):
    """None may be chosen: mean of an empty selection is NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[x[:, 0] > 0].mean(0)


@awkward("values/boolean-index-written")
class BooleanWritten(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y[x < 0] = 0.5
        return y


@awkward("values/masked-select")
class MaskedSelect(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.masked_select(self.linear(x), x > 0.3)


@awkward("values/unique", draw(integers(0, 5, "B", 6)))
class Unique(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
        return values, inverse, counts


@awkward("values/bincount", draw(integers(0, 9, "B")))
class Bincount(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bincount(x)


@awkward("values/repeat-interleave", draw(normal(3, 8), integers(0, 4, 3)), batches=(), seeds=4)
class RepeatInterleave(Linear):
    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return self.linear(x).repeat_interleave(counts, dim=0)


@sequences("values/range-of-longest", redraw=draw(normal("B", "L", 8), lengths()), path="eager")
class RangeOfLongest(Linear):
    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        total = torch.zeros_like(x[:, 0])
        for t in range(int(n.min())):
            total = total + self.linear(x[:, t])
        return total


@awkward("values/early-return", others={"zeros": lambda: call(torch.zeros(2, 8))}, path="eager")
class EarlyReturn(Linear):
    def forward(self, x: Tensor) -> Tensor | None:
        if not x.any():
            return None
        return self.linear(x)


@awkward("values/python-sort", path="eager")
class PythonSort(Linear):
    def forward(self, x: Tensor) -> Tensor:
        rows = sorted(self.linear(x), key=lambda row: float(row[0]))
        return torch.stack(rows)


@awkward("values/choice-of-expert", seeds=5, path="eager")
class ChoiceOfExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.gate = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(self.gate(x).sum(0).argmax())](x)


@awkward("values/experts-by-index", seeds=4)
class ExpertsByIndex(nn.Module):
    """As mixtures of experts are written: rows found by torch.where, added by index_add_."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.gate = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == number)
            out.index_add_(0, row, expert(x[row]) * weight[row, slot, None])
        return out


@awkward(
    "values/refuses-negatives",
    others={"refused": lambda: call(torch.full((2, 8), -1.0))},
    redraw=draw(lambda batch, length: torch.rand(batch, 8)),
    path="eager",
)
class RefusesNegatives(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if (x < 0).any():
            raise ValueError("negative input")
        return self.linear(x)


@awkward(
    "values/assertion",
    others={"refused": lambda: call(torch.full((2, 8), 10.0))},
    path="eager",
)
class Assertion(Linear):
    def forward(self, x: Tensor) -> Tensor:
        assert x.max() < 9, "too large"
        return self.linear(x)


@awkward(
    "values/assert-async",
    others={"refused": lambda: call(torch.full((2, 8), 10.0))},
)
class AssertAsync(Linear):
    """torch's own assertion, as a graph can hold it."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert_async((x < 9).all(), "too large")
        return self.linear(x)


@awkward(
    "values/equal-tensors",
    draw(normal("B", 8), normal("B", 8)),
    path="eager",
    others={
        "equal ones": lambda: call(torch.ones(2, 8), torch.ones(2, 8)),
    },
)
class EqualTensors(Linear):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x) if torch.equal(x, y) else self.linear(y)


@awkward("values/membership", draw(integers(0, 6, "B")), path="eager", seeds=4)
class Membership(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x) * (2.0 if 3 in x else 1.0)


@awkward("values/formatted", path="eager")
class Formatted(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return self.linear(x), f"{x[0, 0]:.3f}"


@awkward("values/dict-by-value", draw(normal("B", 8), integers(0, 2)), path="eager", seeds=5)
class DictByValue(Linear):
    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        table: dict[int, Any] = {0: torch.relu, 1: torch.tanh}
        return table[which.item()](self.linear(x))
