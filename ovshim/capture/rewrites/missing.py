"""Operators that OpenVINO has no counterpart for, made of such as it has. `x != x` is NaN."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ovshim.capture.rewrites.entry import (
    Function,
    Rewrite,
    always,
    dtype_of,
    in_place,
    of_floats,
    wrapping,
)
from ovshim.capture.rewrites.integers import equal
from ovshim.capture.rewrites.sizes import larger, smaller

__all__ = ["TABLE"]


def diff(
    x: torch.Tensor,
    n: int = 1,
    dim: int = -1,
    prepend: torch.Tensor | None = None,
    append: torch.Tensor | None = None,
) -> torch.Tensor:
    parts = [part for part in (prepend, x, append) if part is not None]
    made = torch.cat(parts, dim) if len(parts) > 1 else x
    before = (slice(None),) * (dim % x.dim())
    for _ in range(n):
        later, earlier = made[(*before, slice(1, None))], made[(*before, slice(None, -1))]
        made = later ^ earlier if made.dtype is torch.bool else _minus(later, earlier)
    return made


_minus = wrapping(operator.sub)


def trunc(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 0, torch.ceil(x), torch.floor(x))


def frac(x: torch.Tensor) -> torch.Tensor:
    return x - trunc(x)


def nan_to_num(
    x: torch.Tensor,
    nan: float | None = None,
    posinf: float | None = None,
    neginf: float | None = None,
) -> torch.Tensor:
    limits = torch.finfo(x.dtype)
    most = limits.max if posinf is None else posinf
    least = limits.min if neginf is None else neginf
    known = torch.where(x != x, torch.full((), nan or 0.0, dtype=x.dtype), x)
    known = torch.where(known == math.inf, torch.full((), most, dtype=x.dtype), known)
    return torch.where(known == -math.inf, torch.full((), least, dtype=x.dtype), known)


def is_positive_infinity(x: torch.Tensor) -> torch.Tensor:
    return x == math.inf


def is_negative_infinity(x: torch.Tensor) -> torch.Tensor:
    return x == -math.inf


def differs_from_itself(x: torch.Tensor) -> torch.Tensor:
    """isnan and isinf of integers."""
    return x != x


def equals_itself(x: torch.Tensor) -> torch.Tensor:
    """isfinite of integers."""
    return x == x


def threshold(
    x: torch.Tensor, threshold: float, value: float, inplace: bool = False
) -> torch.Tensor:
    made = torch.where(x <= threshold, torch.full((), value, dtype=x.dtype), x)
    return x.copy_(made) if inplace else made


def softshrink(x: torch.Tensor, lambd: float = 0.5) -> torch.Tensor:
    below = torch.where(x < -lambd, x + lambd, x * 0)
    return torch.where(x > lambd, x - lambd, below)


def hardshrink(x: torch.Tensor, lambd: float = 0.5) -> torch.Tensor:
    return torch.where((x >= -lambd) & (x <= lambd), torch.zeros_like(x), x)


def logit(x: torch.Tensor, eps: float | None = None) -> torch.Tensor:
    limited = x if eps is None else x.clamp(eps, 1 - eps)
    return torch.log(limited / (1 - limited))


def xlogy(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    product = x * torch.log(other)
    return torch.where((x == 0) & (other == other), torch.zeros_like(product), product)


def exp2(x: torch.Tensor) -> torch.Tensor:
    return torch.pow(2.0, x)


def deg2rad(x: torch.Tensor) -> torch.Tensor:
    return x * (math.pi / 180)


def sinc(x: torch.Tensor) -> torch.Tensor:
    turned = x * math.pi
    # What OpenVINO takes for 0 in a product, it does not in a comparison: numbers below the normal.
    near = x.abs() <= torch.finfo(x.dtype).tiny
    return torch.where(near, torch.ones_like(x), torch.sin(turned) / turned)


def dist(x: torch.Tensor, other: torch.Tensor, p: float = 2) -> torch.Tensor:
    made: torch.Tensor = torch.linalg.vector_norm(x - other, p)
    return made


def trapezoid(y: torch.Tensor, *, dx: float = 1.0, dim: int = -1) -> torch.Tensor:
    before = (slice(None),) * (dim % y.dim())
    later, earlier = y[(*before, slice(1, None))], y[(*before, slice(None, -1))]
    return (later + earlier).sum(dim) * (dx / 2)


def _evenly_spaced(node: Node) -> Function | None:
    usual = len(node.args) == 1 and "x" not in node.kwargs and "y" not in node.kwargs
    return of_floats(trapezoid)(node) if usual else None


def positive(x: torch.Tensor) -> torch.Tensor:
    return x


def fmax(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    known = torch.where(other != other, x, torch.maximum(x, other))
    return torch.where(x != x, other, known)


def fmin(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    known = torch.where(other != other, x, torch.minimum(x, other))
    return torch.where(x != x, other, known)


def addcdiv(
    x: torch.Tensor, tensor1: torch.Tensor, tensor2: torch.Tensor, *, value: float = 1
) -> torch.Tensor:
    return x + value * tensor1 / tensor2


def count_nonzero(x: torch.Tensor, dim: Any = None) -> torch.Tensor:
    return (x != 0).sum() if dim is None else (x != 0).sum(dim)


def nansum(x: torch.Tensor, dim: Any = None, keepdim: bool = False) -> torch.Tensor:
    known = torch.where(x != x, torch.zeros_like(x), x)
    return known.sum() if dim is None else known.sum(dim, keepdim=keepdim)


def nanmean(x: torch.Tensor, dim: Any = None, keepdim: bool = False) -> torch.Tensor:
    known = x == x
    count = known.sum() if dim is None else known.sum(dim, keepdim=keepdim)
    return nansum(x, dim, keepdim) / count


def isclose(
    x: torch.Tensor,
    other: torch.Tensor,
    rtol: float = 1e-5,
    atol: float = 1e-8,
    equal_nan: bool = False,
) -> torch.Tensor:
    distance = (x - other).abs()
    close = (x == other) | ((distance <= atol + (rtol * other).abs()) & (distance < math.inf))
    return close | ((x != x) & (other != other)) if equal_nan else close


def isin(
    elements: torch.Tensor,
    test_elements: torch.Tensor,
    *,
    assume_unique: bool = False,
    invert: bool = False,
) -> torch.Tensor:
    # Of integers beyond 2**24 float32, in which OpenVINO compares, knows no neighbours.
    both = map(torch.as_tensor, (elements, test_elements))
    same = operator.eq if any(x.is_floating_point() for x in both) else equal
    if not isinstance(test_elements, torch.Tensor):
        found = same(elements, test_elements)
    else:
        found = same(elements.unsqueeze(-1), test_elements.reshape(-1)).any(-1)
    return ~found if invert else found


def cosine_similarity(
    x1: torch.Tensor, x2: torch.Tensor, dim: int = 1, eps: float = 1e-8
) -> torch.Tensor:
    one = x1 / torch.linalg.vector_norm(x1, 2, dim, keepdim=True).clamp(min=eps)
    other = x2 / torch.linalg.vector_norm(x2, 2, dim, keepdim=True).clamp(min=eps)
    made: torch.Tensor = (one * other).sum(dim)
    return made


def pairwise_distance(
    x1: torch.Tensor, x2: torch.Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> torch.Tensor:
    made: torch.Tensor = torch.linalg.vector_norm(x1 - x2 + eps, p, -1, keepdim)
    return made


def bilinear(
    x1: torch.Tensor, x2: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    outputs, one, other = weight.shape
    halfway = F.linear(x1, weight.transpose(1, 2).reshape(outputs * other, one))
    table = halfway.unflatten(-1, (outputs, other))  # type: ignore[no-untyped-call]
    made: torch.Tensor = (table * x2.unsqueeze(-2)).sum(-1)
    return made if bias is None else made + bias


def diagonal(x: torch.Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> torch.Tensor:
    last = x.movedim((dim1, dim2), (-2, -1))
    down, right = max(-offset, 0), max(offset, 0)
    count = larger(smaller(last.shape[-2] - down, last.shape[-1] - right), 0)
    place = torch.arange(count)  # type: ignore[arg-type]
    return last[..., place + down, place + right]


def diag(x: torch.Tensor, diagonal: int = 0) -> torch.Tensor:
    return _diagonal(x, diagonal)


_diagonal = diagonal


def trace(x: torch.Tensor) -> torch.Tensor:
    return diagonal(x).sum()


def _of_matrices(node: Node) -> Function | None:
    fake = node.args[0].meta["example_value"]  # type: ignore[union-attr]
    return diag if fake.dim() == 2 else None


def _real(node: Node) -> Function | None:
    dtype = dtype_of(node.args[0])
    return None if dtype is None or dtype.is_complex else torch.sign


def _of_integers(function: Function) -> Any:
    def choose(node: Node) -> Function | None:
        dtype = dtype_of(node.args[0])
        return None if dtype is None or dtype.is_floating_point or dtype.is_complex else function

    return choose


_NONE = "has no counterpart"
_FLOATS: tuple[tuple[str, Function], ...] = (
    ("trunc", trunc),
    ("fix", trunc),
    ("frac", frac),
    ("nan_to_num", nan_to_num),
    ("isposinf", is_positive_infinity),
    ("isneginf", is_negative_infinity),
    ("logit", logit),
    ("xlogy", xlogy),
    ("exp2", exp2),
    ("fmax", fmax),
    ("fmin", fmin),
    ("addcdiv", addcdiv),
    ("nansum", nansum),
    ("nanmean", nanmean),
    ("isclose", isclose),
    ("deg2rad", deg2rad),
    ("sinc", sinc),
    ("dist", dist),
)
_ANY = (
    ("positive", positive),
    ("diff", diff),
    ("count_nonzero", count_nonzero),
    ("diagonal", diagonal),
    ("trace", trace),
)
_INTEGERS = (("isnan", differs_from_itself), ("isinf", differs_from_itself))

TABLE = (
    *(Rewrite((getattr(torch, n), n), of_floats(f), _NONE) for n, f in _FLOATS),
    *(Rewrite((getattr(torch, n), n), always(f), _NONE) for n, f in _ANY),
    *(Rewrite((getattr(torch, n), n), _of_integers(f), _NONE) for n, f in _INTEGERS),
    Rewrite((torch.isfinite, "isfinite"), _of_integers(equals_itself), _NONE),
    Rewrite((torch.sgn, "sgn"), _real, _NONE),
    Rewrite((torch.diag, "diag"), _of_matrices, _NONE),
    Rewrite((torch.trapz, torch.trapezoid), _evenly_spaced, _NONE),
    Rewrite((torch.isin,), always(isin), _NONE),
    Rewrite((torch._is_all_true, "_is_all_true"), always(torch.all), _NONE),
    Rewrite((F.threshold, torch.threshold), of_floats(threshold), _NONE),
    Rewrite((torch.threshold_,), of_floats(in_place(threshold)), _NONE),
    Rewrite((F.softshrink,), of_floats(softshrink), _NONE),
    Rewrite((F.hardshrink, torch.hardshrink), of_floats(hardshrink), _NONE),
    Rewrite((F.cosine_similarity, torch.cosine_similarity), of_floats(cosine_similarity), _NONE),
    Rewrite((F.pairwise_distance,), of_floats(pairwise_distance), "has another sign of eps"),
    Rewrite((F.bilinear,), of_floats(bilinear), _NONE),
)
