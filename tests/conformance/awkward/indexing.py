"""Looking up and writing by index: ranges that eager enforces, duplicates, negative indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance.awkward.dtypes import Apply
from conformance.awkward.registering import awkward
from conformance.awkward.values import Linear
from conformance.drawing import Part, draw, integers, normal
from conformance.entries import call

X = normal("B", 8)
IDS = integers(0, 8, "B", 3)


def applied(name: str, function: Callable[..., Any], *parts: Part, **fields: Any) -> None:
    awkward(f"indexing/{name}", draw(*(parts or (X,))), **fields)(lambda: Apply(function))


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


OUT_OF_RANGE = {
    "too large": lambda: call(ids([1, 10, 2], [0, 0, 0])),
    "far too large": lambda: call(ids([1, 2**33, 2])),
    "negative": lambda: call(ids([1, -1, 2])),
    "largest": lambda: call(ids([9, 9, 9], [0, 0, 0])),
    "none": lambda: call(torch.zeros(0, 3, dtype=torch.int64)),
}


@awkward("indexing/embedding", draw(integers(0, 10, "B", 3)), others=OUT_OF_RANGE, path="openvino")
class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8, padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


@awkward(
    "indexing/embedding-shifted",
    draw(integers(0, 8, "B", 3)),
    others={
        "within": lambda: call(ids([7, 0, 1])),
        "too large": lambda: call(ids([8, 0, 1])),
        "too small": lambda: call(ids([-3, 0, 1])),
        "least": lambda: call(ids([-2, 0, 1])),
    },
)
class EmbeddingShifted(nn.Module):
    """As OPT's positions: two are added before the look-up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids + 2)


@awkward(
    "indexing/embedding-of-positions",
    draw(integers(0, 2, "B", 5)),
    others={
        "all ones": lambda: call(torch.ones(2, 5, dtype=torch.int64)),
        "too many": lambda: call(torch.full((2, 5), 3)),
    },
)
class EmbeddingOfPositions(nn.Module):
    """Positions made of a mask: its sum has to stay within the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 8)

    def forward(self, mask: Tensor) -> Tensor:
        return self.table(mask.cumsum(1) * (mask > 0))


@awkward(
    "indexing/two-tables",
    draw(integers(0, 10, "B", 3)),
    others={
        "beyond the second": lambda: call(ids([9, 1, 1])),
        "beyond both": lambda: call(ids([10, 1, 1])),
    },
    size=(2, 5),
    seeds=4,
)
class TwoTables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Embedding(10, 8)
        self.small = nn.Embedding(10, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([self.large(ids), self.small((ids - 1).clamp(0))], -1)


@awkward("indexing/table-by-index", draw(integers(0, 10, "B", 3)), others=OUT_OF_RANGE)
class TableByIndex(nn.Module):
    """Plain indexing, where negative ones count from the end."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, 8))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


@awkward("indexing/embedding-bag", draw(integers(0, 10, "B", 3)), others=OUT_OF_RANGE)
class EmbeddingBag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(10, 8, mode="mean")

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def _offsets(batch: int, length: int) -> Tensor:
    inner = torch.randint(0, 7, (batch - 1,)).sort().values
    return torch.cat([torch.zeros(1, dtype=torch.int64), inner])


for mode in ("sum", "mean", "max"):
    awkward(f"indexing/embedding-bag-{mode}", draw(integers(0, 10, 7), _offsets), seeds=3)(
        lambda mode=mode: nn.EmbeddingBag(10, 8, mode=mode, include_last_offset=False)
    )


@awkward("indexing/embedding-bag-weighted", draw(integers(0, 10, "B", 3), normal("B", 3)))
class EmbeddingBagWeighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(10, 8, mode="sum", padding_idx=2)

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        return self.table(ids, per_sample_weights=weights)


applied(
    "gather",
    lambda x, i: x.gather(1, i),
    X,
    IDS,
    others={
        "too large": lambda: call(torch.randn(2, 8), ids([1, 8, 2], [0, 0, 0])),
        "negative": lambda: call(torch.randn(2, 8), ids([1, -1, 2], [0, 0, 0])),
        "fewer rows": lambda: call(torch.randn(2, 8), ids([1, 7, 2])),
        "more rows": lambda: call(torch.randn(1, 8), ids([1, 7, 2], [0, 0, 0])),
    },
)
applied("take-along", lambda x, i: torch.take_along_dim(x, i, 1), X, IDS)
applied(
    "index-select",
    lambda x, i: x.index_select(1, i),
    X,
    integers(0, 8, 3),
    others={
        "too large": lambda: call(torch.randn(2, 8), torch.tensor([1, 8, 2])),
        "negative": lambda: call(torch.randn(2, 8), torch.tensor([1, -1, 2])),
    },
)
applied(
    "by-tensor",
    lambda x, i: (x[:, i], x[:, i[0]] + 0, x[0, i], x[..., i - 8]),
    X,
    integers(0, 8, 3),
    others={"out of range": lambda: call(torch.randn(2, 8), torch.tensor([1, 8, 2]))},
)
applied(
    "by-0-d",
    lambda x, n: x[:, n] + 0,
    X,
    integers(0, 8),
    seeds=4,
    others={
        "too large": lambda: call(torch.randn(2, 8), torch.tensor(8)),
        "negative": lambda: call(torch.randn(2, 8), torch.tensor(-1)),
    },
)
applied(
    "mixed",
    lambda x, i: (x[:, None, [0, 2]], x[i % 2, i], x[[0]], x[..., 1:-1:2] + 0, x[None] * 1),
    X,
    integers(0, 8, 3),
    batches=(2, 3, 5),
)
applied("by-mask-row", lambda x: (x[:, torch.tensor([True, False] * 4)], x[:, x[0] > -9]))
applied(
    "scatter",
    lambda x, i: (x.scatter(1, i, 5.0), torch.zeros_like(x).scatter(1, i, x[:, :3])),
    X,
    integers(0, 8, "B", 1),
    others={
        "out of range": lambda: call(torch.randn(2, 8), ids([8], [0])),
    },
)
applied(
    "scatter-add",
    lambda x, i: (
        x.scatter_add(1, i, x[:, :3]),
        x.scatter_reduce(1, i, x[:, :3], "amax"),
        x.scatter_reduce(1, i, x[:, :3], "mean", include_self=False),
    ),
    X,
    IDS,
)
applied(
    "index-put",
    lambda x, i: (
        x.index_put((i[0], i[1]), torch.tensor(2.0)),
        x.index_put((i[0],), x[:1], accumulate=True),
    ),
    normal(6, 8),
    integers(0, 6, 2, 3),
    batches=(),
)
applied(
    "index-add",
    lambda x, i: (
        x.index_add(0, i, x[:3]),
        x.index_add(0, i, x[:3], alpha=2),
        x.index_copy(0, i[:1], x[:1]),
    ),
    normal(6, 8),
    integers(0, 6, 3),
    batches=(),
)
applied("written-slices", lambda x: _written(x))
applied(
    "masked",
    lambda x: (
        x.masked_fill(x > 0, 2.0),
        x.masked_fill(x[:, :1] > 0, -torch.inf),
        x.masked_scatter(x > 0, torch.arange(80.0)),
        torch.where(x > 0, x, -1),
    ),
)
applied(
    "one-hot",
    lambda i: (F.one_hot(i, 8), F.one_hot(i, 8).float().sum(1)),
    IDS,
    others={
        "out of range": lambda: call(ids([8, 1, 2])),
    },
)
applied("one-hot-open", lambda i: F.one_hot(i), IDS, seeds=4)
applied(
    "triangles",
    lambda x: (
        x.tril(),
        x.triu(1),
        torch.triu_indices(3, 4),
        x.diagonal() + 0,
        torch.diag_embed(x),
        x.tril(-1),
    ),
    batches=(1, 3, 8),
)
applied("rolled", lambda x: (x.roll(3, 1), x.roll((1, 2), (0, 1)), x.flip(0, 1), x.rot90()))
applied(
    "stacked",
    lambda x: (
        torch.stack([x, x * 2], 1),
        torch.cat([x, x.new_zeros(0, 8)]),
        torch.hstack([x, x]),
        torch.vstack([x, x]),
        torch.block_diag(x, x),
        torch.meshgrid(x[0], x[0, :3], indexing="ij")[1] + 0,
    ),
)
applied(
    "repeated",
    lambda x: (
        x.repeat(2, 3),
        x.tile(2),
        x.repeat_interleave(2, 1),
        x[:, None].expand(-1, 4, -1) * 1,
        x.unflatten(1, (2, -1)) * 1,
        x.view(-1, 2, 4).movedim(1, -1) + 0,
        x.swapaxes(0, 1) * 2,
    ),
)
applied(
    "products",
    lambda x: (
        x @ x.t(),
        torch.outer(x[0], x[0]),
        torch.cross(x[:, :3], x[:, 3:6], dim=1),
        torch.bmm(x[:, :, None], x[:, None]),
        x.mv(x[0]),
        x[0].dot(x[0]),
    ),
)
applied(
    "einsum",
    lambda x, y: (
        torch.einsum("bi,bj->ij", x, y),
        torch.einsum("bi,bi->b", x, y),
        torch.einsum("bi,ci", x, y),
        torch.einsum("...i->...", x),
        torch.einsum("bi,bj,bk->bijk", x[:, :2], y[:, :2], x[:, :2]),
        torch.einsum("bi->ib", x) + 0,
    ),
    X,
    X,
)
applied(
    "as-strided", lambda x: (x.as_strided((2, 3), (1, 2)) + 1, x.contiguous().view(-1)[::3] + 0)
)
applied("sorted-and-gathered", lambda x: x.gather(1, x.argsort(1, descending=True)[:, :3]))
applied(
    "split",
    lambda x: (*(x.split([3, 5], 1)[1] + 1), *(p * 2 for p in x.tensor_split(3, 1))),
    normal(3, 8),
    batches=(),
)

for name, lone in {
    "fliplr": lambda x: x.fliplr(),
    "kron": lambda x: torch.kron(x, x[:1]),
    "tensordot": lambda x: torch.tensordot(x, x, dims=([1], [1])),
    "take": lambda x: torch.take(x, torch.tensor([0, 3])),
    "index-fill": lambda x: x.index_fill(1, torch.tensor([0, 3]), 3.0),
    "diagonal-written": lambda x: _diagonal(x * 1),
}.items():
    applied(name, lone)


def _diagonal(x: Tensor) -> Tensor:
    x.diagonal().add_(1)
    return x


def _written(x: Tensor) -> Tensor:
    y = x * 1
    y[:, 0] = 0
    y[..., 1:3] += 5
    y[0] = y[-1]
    y[:, -2:] = torch.tensor([1.0, 2.0])

    return y


@awkward(
    "indexing/rows-of-last-token", draw(normal("B", "L", 8), integers(1, 5, "B")), lengths=(5, 7, 9)
)
class LastToken(Linear):
    """As classifiers on decoders pick their token."""

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        return self.linear(x)[torch.arange(x.shape[0]), n - 1]


@awkward("indexing/relative-positions", draw(normal("B", "L", 8)), lengths=(4, 7, 9))
class RelativePositions(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(9, 1)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1])
        distance = (steps[:, None] - steps[None]).clamp(-4, 4) + 4
        return (x @ self.linear(x).mT + self.bias(distance)[..., 0]).softmax(-1)
