"""Sums of products that OpenVINO has no counterpart for, as products of matrices or `einsum`."""

from __future__ import annotations

import functools
import string
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ovshim.capture.rewrites.entry import Function, Rewrite, argument, of_floats, tensor_of

__all__ = ["TABLE"]


def contracted(x: torch.Tensor, y: torch.Tensor, mine: Sequence[int], its: Sequence[int]) -> Any:
    """The sum over dimensions `mine` of `x` and `its` of `y`, pair by pair."""
    letters = iter(string.ascii_letters)
    of_x = [next(letters) for _ in range(x.dim())]
    of_y = [next(letters) for _ in range(y.dim())]
    for a, b in zip(mine, its, strict=True):
        of_y[b] = of_x[a]
    left = [c for i, c in enumerate(of_x) if i not in mine]
    left += [c for i, c in enumerate(of_y) if i not in its]
    return torch.einsum(f"{''.join(of_x)},{''.join(of_y)}->{''.join(left)}", x, y)


def _tensordot(node: Node) -> Function | None:
    x, y = tensor_of(argument(node, 0, "a")), tensor_of(argument(node, 1, "b"))
    dims = argument(node, 2, "dims", 2)
    if x is None or y is None or "out" in node.kwargs or x.dim() + y.dim() > 52:
        return None
    if isinstance(dims, int):
        mine, its = list(range(x.dim() - dims, x.dim())), list(range(dims))
    elif isinstance(dims, (tuple, list)) and len(dims) == 2:
        pair = [[of] if isinstance(of, int) else list(of) for of in dims]
        mine, its = [d % x.dim() for d in pair[0]], [d % y.dim() for d in pair[1]]
    else:
        return None
    # Where one of the two is 1 eager sums the other alone.
    if not all(
        statically_known_true(x.shape[a] == y.shape[b]) for a, b in zip(mine, its, strict=True)
    ):
        return None
    node.args = (argument(node, 0, "a"), argument(node, 1, "b"), mine, its)
    node.kwargs = {}
    return contracted


def inner(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = contracted(x, y, [x.dim() - 1], [y.dim() - 1])
    return made


def _inner(node: Node) -> Function | None:
    fakes = [tensor_of(x) for x in node.args[:2]]
    usable = all(fake is not None and fake.dim() > 0 for fake in fakes)
    return inner if usable and "out" not in node.kwargs else None


def vecdot(x: torch.Tensor, y: torch.Tensor, *, dim: int = -1) -> torch.Tensor:
    return (x * y).sum(dim)


def addmv(
    x: torch.Tensor, mat: torch.Tensor, vec: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return _added(x, mat @ vec, beta, alpha)


def addr(
    x: torch.Tensor, vec1: torch.Tensor, vec2: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return _added(x, vec1[:, None] * vec2, beta, alpha)


def addbmm(
    x: torch.Tensor,
    batch1: torch.Tensor,
    batch2: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    return _added(x, torch.bmm(batch1, batch2).sum(0), beta, alpha)


def _added(x: torch.Tensor, product: torch.Tensor, beta: float, alpha: float) -> torch.Tensor:
    # With beta 0 eager does not look at x at all, be it NaN.
    return alpha * product if beta == 0 else beta * x + alpha * product


def multi_dot(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.matmul, tensors)


def kron(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    rows, columns = x.shape[0] * y.shape[0], x.shape[1] * y.shape[1]
    return (x[:, None, :, None] * y[None, :, None, :]).reshape(rows, columns)


def _kron(node: Node) -> Function | None:
    fakes = [tensor_of(x) for x in node.args[:2]]
    return kron if all(fake is not None and fake.dim() == 2 for fake in fakes) else None


def _floats_too(choose: Any) -> Any:
    floats = of_floats(choose)
    return lambda node: None if floats(node) is None else choose(node)


_NONE = "has no counterpart"

TABLE = (
    Rewrite((torch.tensordot,), _floats_too(_tensordot), _NONE),
    Rewrite((torch.inner, "inner"), _floats_too(_inner), _NONE),
    Rewrite((torch.linalg.vecdot,), of_floats(vecdot), _NONE),
    Rewrite((torch.addmv, "addmv"), of_floats(addmv), _NONE),
    Rewrite((torch.addr, "addr"), of_floats(addr), _NONE),
    Rewrite((torch.addbmm, "addbmm"), of_floats(addbmm), _NONE),
    Rewrite((torch.linalg.multi_dot,), of_floats(multi_dot), _NONE),
    Rewrite((torch.kron, "kron"), _floats_too(_kron), _NONE),
)
