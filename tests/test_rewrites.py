"""Each replacement: without it OpenVINO is wrong or refuses, with it ovshim serves and is right."""

import math
import operator
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import check, plans, settle
from hypothesis import given, settings
from hypothesis import strategies as st
from modules import Function
from torch import Tensor, nn
from torch._dynamo import convert_frame, decorators

import ovshim
from ovshim import runtime
from ovshim.capture import CaptureError, Request, dynamo, frontend, rewrites
from ovshim.capture.rewrites import division, integers, operators, sizes
from ovshim.capture.rewrites.entry import Rewrite
from ovshim.guards import sizes_hold
from ovshim.shortage import compile_failure
from ovshim.signature import flatten, flatten_call, kind_of

torch.manual_seed(0)


@dataclass(frozen=True)
class Case:
    """A function and arguments of the same sizes: the example, and others."""

    function: Callable[..., Any]
    example: tuple[Tensor, ...]
    others: tuple[tuple[Tensor, ...], ...] = ()


def case(function: Callable[..., Any], *calls: Any) -> Case:
    example, *others = (call if isinstance(call, tuple) else (call,) for call in calls)
    return Case(function, example, tuple(others))


def written(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that writes to its argument, on a copy."""
    return lambda x: function(x.clone())


def into(operator_: Callable[[Any, Any], Any], number: Any) -> Callable[[Tensor], Tensor]:
    return written(lambda x: operator_(x, number))


def mixed(function: Callable[[Tensor, Tensor], Any]) -> Case:
    """Integers of either sign and beyond float32, and floats that are whole multiples or nearly."""
    whole = torch.tensor([-7, -6, -1, 0, 1, 6, 7, 100, -(2**24) - 1, 2**24 + 1, 2**30 + 1, 12345])
    return case(function, (whole, torch.arange(-60, 60) / 10), (whole.flip(0), torch.randn(120)))


SMALL = torch.tensor([1, 2, 3, 5], dtype=torch.uint8)
LARGE = torch.tensor([255, 254, 100, 7], dtype=torch.uint8)
SIGNED = torch.tensor([-128, 127, 100, -3], dtype=torch.int8)
MATRIX = torch.arange(-8, 8, dtype=torch.int8).view(4, 4)
NEIGHBOURS = torch.tensor([2**24, 2**24 + 1, -(2**24) - 1, 2**31 - 1, -(2**31), 0, 7])
FLOATS = torch.tensor([-3.3, -0.4, 0.0, 0.3, 0.77, 12.5])
WHOLE = torch.arange(1.0, 101.0)[:, None]
PLACES = torch.arange(6)
PLANE = torch.randn(1, 2, 9, 8)
# Where it is their logarithm that is compared: values that are small, and right to their own size.
NEAR_0 = torch.cat([torch.logspace(-12, 0, 13), -torch.logspace(-12, -0.1, 13)])
WIDE = torch.tensor([-80.0, -20.0, -8.0, -3.0, -0.1, 0.0, 0.1, 3.0, 8.0, 20.0, 86.0])


def compared(operation: Callable[[Any, Any], Any]) -> Case:
    return case(lambda x: operation(x[:, None], x[None]), NEIGHBOURS)


def attended(mask: Tensor) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 2, 4, 8), mask


SEEN = torch.ones(2, 1, 4, 4, dtype=torch.bool)
HIDDEN = SEEN & (torch.arange(4) != 1)[:, None]

IN_PLACE = {
    f"operators/{name}_": case(written(lambda x, n=name: getattr(x, f"{n}_")(0.3)), FLOATS)
    for name in (*operators._COMPARISONS, "greater_equal", "not_equal")
} | {
    f"operators/{name}_": case(
        lambda x, y, n=name: getattr(x.clone(), f"{n}_")(y), (FLOATS, FLOATS.flip(0))
    )
    for name in ("logical_and", "logical_or", "logical_xor")
}


def pooled(pool: Callable[..., Tensor], dims: int) -> Case:
    sizes_ = (1, 2, 10, 9, 8)[: 2 + dims]
    kind = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims]
    module = kind(3, 2, 1, ceil_mode=True)
    # Eager's own pool of volumes takes no larger window either.
    wide = [kind(size[:dims], ceil_mode=True) for size in ((12, 12), (12, 3)) if dims < 3]
    return case(
        lambda x: (pool(x, 3, 2, 1, ceil_mode=True), module(x), *[each(x) for each in wide]),
        torch.randn(sizes_),
    )


def second_of_constant(x: Tensor) -> Tensor:
    constant = torch.tensor([1.0, 2.0, 3.0, 4.0])
    constant.add_(1)
    return constant * x


def selected(x: Tensor, index: Tensor) -> Tensor:
    return x[torch.arange(3), index]


def floored(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (x / y).ceil().long(), (x / 0.7).floor(), (x / 7).int()


def bagged(ids: Tensor, offsets: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    table, flat = torch.arange(24.0).view(12, 2) + 1, ids.view(-1)
    return (
        F.embedding_bag(ids, table, mode="mean", padding_idx=2),
        F.embedding_bag(ids, table, mode="sum", padding_idx=-10),
        F.embedding_bag(ids, table, mode="sum", per_sample_weights=weights, padding_idx=2),
        F.embedding_bag(flat, table, offsets, mode="mean", padding_idx=2),
    )


def odd(places: Tensor) -> Tensor:
    """Values that are no numbers, made inside: a call with such inputs would go to eager."""
    return torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1.5, -2.0])[places]


def sizes_of(x: Tensor) -> Tensor:
    """What shows whether small values are right to their own size."""
    return x.abs().log()


# By the module of the entry and the name of its first target.
HALVES = torch.tensor([30000, -3, 20000, 32767, 5], dtype=torch.int16)
CASES = {
    "attention/scaled_dot_product_attention": case(
        lambda q, mask: F.scaled_dot_product_attention(q, q, q, mask),
        attended(SEEN),
        attended(HIDDEN),
    ),
    "division/floordiv": mixed(lambda i, f: (i // 3, 10**6 // i.clamp(1), (f // 0.7).long())),
    "division/ifloordiv": case(into(operator.ifloordiv, 3), torch.arange(-5, 5)),
    "division/mod": mixed(lambda i, f: (i % 7, i % -3, f % 0.3, -5 % (f.abs() + 0.1))),
    "division/imod": case(into(operator.imod, 0.3), torch.arange(-60, 60) / 10),
    "division/fmod": mixed(lambda i, f: (torch.fmod(i, 7), torch.fmod(f, 0.3))),
    "division/div": mixed(
        lambda i, f: (
            torch.div(i, 3, rounding_mode="floor"),
            torch.div(i, 7, rounding_mode="trunc"),
            torch.div(f, 0.7, rounding_mode="trunc").long(),
        )
    ),
    "division/div_": case(written(lambda x: x.div_(3, rounding_mode="floor")), torch.arange(-5, 5)),
    "division/truediv": case(floored, (WHOLE * torch.arange(1.0, 61.0), WHOLE)),
    "integers/add": case(lambda x: x + 100, SMALL, LARGE),
    "integers/sub": case(lambda x: 3 - x, SMALL, LARGE),
    "integers/rsub": case(lambda x: torch.rsub(x, 3), SMALL, LARGE),
    "integers/mul": case(lambda x: x * 3, SMALL, LARGE),
    "integers/neg": case(lambda x: -x, SMALL, LARGE),
    "integers/abs": case(torch.abs, SIGNED),
    "integers/matmul": case(lambda x: x @ x.T, MATRIX),
    "integers/bmm": case(lambda x: torch.bmm(x[None], x.T[None]), MATRIX),
    "integers/mm": case(lambda x: torch.mm(x, x.T), MATRIX),
    "integers/iadd": case(into(operator.iadd, 100), SMALL, LARGE),
    "integers/isub": case(into(operator.isub, 3), SMALL, LARGE),
    "integers/imul": case(into(operator.imul, 3), SMALL, LARGE),
    "integers/lshift": case(lambda x: (x << 3) / 3, HALVES, -HALVES),
    "integers/ilshift": case(into(operator.ilshift, 3), HALVES, -HALVES),
    "integers/sum": case(lambda x: x.sum(0, dtype=torch.int16) / 3, HALVES, -HALVES),
    "integers/to": case(lambda x: (x * 300).to(torch.uint8), FLOATS),
    "integers/pow": case(lambda x: (x**2, x.square()), torch.tensor([-4097, 3, 46339])),
    "integers/clamp": case(lambda x: x.clamp(max=1.5), torch.arange(4)),
    "integers/eq": compared(operator.eq),
    "integers/ne": compared(operator.ne),
    "integers/lt": compared(operator.lt),
    "integers/le": compared(operator.le),
    "integers/gt": compared(operator.gt),
    "integers/ge": compared(operator.ge),
    "integers/cumsum": case(lambda x: (x > 0).cumsum(0), FLOATS),
    "integers/prod": case(lambda x: x.int().prod(0), FLOATS),
    "exponentials/softplus": case(
        lambda x: (F.softplus(x).log(), F.softplus(x, 2.0, 5.0), 1 / F.softplus(x, 0.5)), WIDE
    ),
    "exponentials/log_sigmoid": case(
        lambda x: ((-F.logsigmoid(x)).log(), F.logsigmoid(x * 10)), WIDE
    ),
    "exponentials/log1p": case(
        lambda x: (sizes_of(torch.log1p(x)), (x * 20).exp().log1p(), (x * 1e9).abs().log1p()),
        NEAR_0,
    ),
    "exponentials/log1p_": case(written(lambda x: sizes_of(x.log1p_())), NEAR_0),
    "exponentials/expm1": case(
        lambda x: (sizes_of(torch.expm1(x)), sizes_of(torch.special.expm1(x * 40))), NEAR_0
    ),
    "exponentials/expm1_": case(written(lambda x: sizes_of(x.expm1_())), NEAR_0),
    "exponentials/log": case(
        lambda x: (
            (1 + x.exp()).log(),
            torch.log2(torch.exp(x) + 1.0),
            x.exp().add_(1).log_(),
            x.exp().add(torch.ones_like(x)).log10(),
        ),
        WIDE,
        WIDE + 10,
    ),
    "operators/round": case(lambda x: (x.round(decimals=1), torch.round(x, decimals=-1)), FLOATS),
    "operators/atan2": case(
        torch.atan2, (torch.tensor([-2.0, -0.0, -0.0, 0.0]), torch.tensor([-3.0, -1.0, 2.0, -1.0]))
    ),
    "operators/mean": case(lambda x: x[:, 8:].mean(1), torch.randn(2, 8)),
    "operators/avg_pool1d": pooled(F.avg_pool1d, 1),
    "operators/avg_pool2d": pooled(F.avg_pool2d, 2),
    "operators/avg_pool3d": pooled(F.avg_pool3d, 3),
    "operators/getitem": case(
        selected,
        (torch.randn(3, 8), torch.tensor([1, 2, 3])),
        (torch.randn(3, 8), torch.tensor([-2, 7, -8])),
    ),
    **IN_PLACE,
    "operators/logical_not_": case(written(lambda x: x.logical_not_()), FLOATS),
    "operators/tensor": case(second_of_constant, torch.randn(4)),
    "operators/gather": case(
        lambda x: x.gather(1, torch.tensor([[7, 0, 3], [1, 1, 2]])), torch.randn(4, 8)
    ),
    "operators/pow": case(lambda x: (-2.0) ** x, torch.arange(4.0)),
    "missing/trunc": case(lambda i: torch.trunc(odd(i)), PLACES),
    "missing/fix": case(torch.fix, FLOATS),
    "missing/frac": case(torch.frac, FLOATS),
    "missing/nan_to_num": case(
        lambda i: (odd(i).nan_to_num(), torch.nan_to_num(odd(i), 1, 2, 3)), PLACES
    ),
    "missing/isposinf": case(lambda i: torch.isposinf(odd(i)), PLACES),
    "missing/isneginf": case(lambda i: torch.isneginf(odd(i)), PLACES),
    "missing/logit": case(lambda x: (x.logit(), torch.logit(x, 0.1)), torch.rand(9)),
    "missing/xlogy": case(
        lambda i, x: torch.xlogy(x, odd(i)), (PLACES, FLOATS), (PLACES, FLOATS * 0)
    ),
    "missing/exp2": case(torch.exp2, FLOATS),
    "missing/fmax": case(lambda i: torch.fmax(odd(i), odd(i.flip(0))), PLACES),
    "missing/fmin": case(lambda i: torch.fmin(odd(i), odd(i.flip(0))), PLACES),
    "missing/addcdiv": case(lambda x, y: x.addcdiv(y, x + 9, value=0.5), (FLOATS, FLOATS.flip(0))),
    "missing/nansum": case(lambda i: (odd(i)[3:].nansum(), odd(i).nansum(0, keepdim=True)), PLACES),
    "missing/nanmean": case(lambda i: (odd(i)[3:].nanmean(), odd(i)[:1].nanmean()), PLACES),
    "missing/isclose": case(
        lambda i: (odd(i).isclose(odd(i) * 1.000001), odd(i).isclose(odd(i), equal_nan=True)),
        PLACES,
    ),
    "missing/diff": case(
        lambda x, i: (x.diff(2, 0), x.diff(prepend=x[:, :1]), (x > 0).diff(), i.diff()),
        (torch.randn(4, 3), SMALL),
        (torch.randn(4, 3), LARGE),
    ),
    "missing/count_nonzero": case(lambda x: (x.count_nonzero(), x.count_nonzero(0)), FLOATS),
    "missing/diagonal": case(
        lambda x: (x.diagonal() + 1, x.diagonal(1) + 1, x.diagonal(-1, 1, 2) + 1),
        torch.randn(3, 4, 3),
    ),
    "missing/trace": case(torch.trace, torch.randn(4, 3)),
    "missing/isnan": case(torch.isnan, SMALL),
    "missing/isinf": case(torch.isinf, SMALL),
    "missing/isfinite": case(torch.isfinite, SMALL),
    "missing/sgn": case(torch.sgn, FLOATS),
    "missing/diag": case(lambda x: x.diag(-1), torch.randn(4, 3)),
    "missing/_is_all_true": case(
        lambda x: (torch._is_all_true(x > 0), torch._is_all_true(x > -9)), torch.randn(3, 4)
    ),
    "missing/isin": case(
        lambda x: (torch.isin(x, torch.tensor([1, 5])), torch.isin(x, 3, invert=True)), NEIGHBOURS
    ),
    "missing/_threshold": case(lambda x: F.threshold(x, 0.3, 9.0), FLOATS),
    "missing/threshold_": case(written(lambda x: F.threshold_(x, 0.3, 9.0)), FLOATS),
    "missing/softshrink": case(lambda x: F.softshrink(x, 0.4), FLOATS),
    "missing/hardshrink": case(lambda x: F.hardshrink(x, 0.4), FLOATS),
    "missing/cosine_similarity": case(
        lambda x, y: F.cosine_similarity(x, y[:, None], dim=-1),
        (torch.randn(3, 4), torch.randn(2, 4)),
        (torch.zeros(3, 4), torch.randn(2, 4)),
    ),
    "missing/pairwise_distance": case(
        lambda x, y: (
            F.pairwise_distance(x, y),
            F.pairwise_distance(x, y[0], p=1, eps=1e-3, keepdim=True),
            nn.PairwiseDistance(torch.inf)(x[:, None], y),
        ),
        (torch.randn(3, 4), torch.randn(3, 4)),
        (torch.ones(3, 4), torch.ones(3, 4)),
        (torch.ones(3, 4), torch.ones(3, 4) + 1e-5),
    ),
    "missing/bilinear": case(
        lambda x, y: F.bilinear(x, y, torch.ones(5, 3, 4), torch.ones(5)),
        (torch.randn(2, 6, 3), torch.randn(2, 6, 4)),
    ),
}
# All are 4 from the mean.
HALF = torch.arange(16000.0)[torch.randperm(16000)].expand(2, -1) % 2 * 8
FAR = HALF, HALF + 30000, HALF - 101325
CASES |= {
    "moments/mean": case(lambda x: (x - x.mean(-1, keepdim=True)).abs() > 3.9, *FAR),
    "moments/var": case(
        lambda x: (x.var(-1), torch.var(x, 1, False), x.var(), x.var((0, 1))), *FAR
    ),
    "moments/std": case(lambda x: (x.std(-1, keepdim=True), x.std(False), x.std(1)), *FAR),
    "moments/var_mean": case(lambda x: torch.var_mean(x, 1, correction=2), *FAR),
    "moments/std_mean": case(lambda x: torch.std_mean(x, dim=(1,), unbiased=False), *FAR),
    "missing/deg2rad": case(torch.deg2rad, FLOATS),
    "missing/sinc": case(torch.sinc, FLOATS, torch.full((6,), 1e-40)),
    "missing/dist": case(lambda x, y: (x.dist(y), torch.dist(x, y, 1)), (FLOATS, FLOATS.flip(0))),
    "missing/positive": case(lambda x: torch.positive(x) + 1, FLOATS),
    "missing/trapz": case(
        lambda x: (torch.trapz(x), torch.trapezoid(x, dx=0.5, dim=0)), torch.randn(3, 4)
    ),
    "products/tensordot": case(
        lambda x, y: (
            torch.tensordot(x, y, ([1, 0], [0, 1])),
            torch.tensordot(x, y, 1),
            torch.tensordot(x, y, 0),
        ),
        (torch.randn(3, 4), torch.randn(4, 3)),
    ),
    "products/inner": case(
        lambda x, y: (torch.inner(x, y), x.inner(y[0]), x[0].inner(y[0])),
        (torch.randn(2, 3, 4), torch.randn(5, 4)),
    ),
    "products/linalg_vecdot": case(
        lambda x, y: (torch.linalg.vecdot(x, y), torch.linalg.vecdot(x, y, dim=0)),
        (torch.randn(3, 4), torch.randn(3, 4)),
    ),
    "products/addmv": case(
        lambda x, m, i: (x.addmv(m, x[:4]), torch.addmv(odd(i)[:3], m, x[:4], beta=0, alpha=2)),
        (torch.randn(3), torch.randn(3, 3), PLACES),
    ),
    "products/addr": case(
        lambda x, y: (torch.addr(y[:, None] * x, y, x), torch.addr(x, y, x, beta=0.5, alpha=2)),
        (torch.randn(4), torch.randn(3)),
    ),
    "products/addbmm": case(
        lambda x, y: x[0] @ y[0] + torch.addbmm(x[0] @ y[0], x, y, beta=0.5, alpha=2),
        (torch.randn(2, 3, 4), torch.randn(2, 4, 5)),
    ),
    "products/linalg_multi_dot": case(
        lambda x: torch.linalg.multi_dot([x, x.T, x]), torch.randn(3, 4)
    ),
    "products/kron": case(torch.kron, (torch.randn(2, 3), torch.randn(4, 2))),
    "bags/embedding_bag": case(
        bagged,
        (torch.tensor([[3, 4, 5], [6, 7, 3]]), torch.tensor([0, 2, 2]), torch.randn(2, 3)),
        (torch.tensor([[3, 2, 2], [2, 2, 2]]), torch.tensor([0, 2, 2]), torch.randn(2, 3)),
    ),
    "nearest/interpolate": case(
        lambda x: (F.interpolate(x, size=(82, 7)), F.interpolate(x, scale_factor=(1.3, 1.25))),
        torch.randn(1, 1, 70, 9),
        torch.randn(1, 1, 76, 9),
        torch.randn(1, 1, 3, 9),
    ),
    "losses/mse_loss": case(
        lambda x, y: (F.mse_loss(x, y), F.mse_loss(x, y, reduction="none")),
        (FLOATS, FLOATS.flip(0)),
    ),
    "losses/l1_loss": case(
        lambda x, y: (F.l1_loss(x, y), F.l1_loss(x, y, reduction="sum")), (FLOATS, FLOATS.flip(0))
    ),
    "losses/smooth_l1_loss": case(
        lambda x, y: (F.smooth_l1_loss(x, y), F.smooth_l1_loss(x, y, beta=0.0)),
        (FLOATS, FLOATS * 1.2),
    ),
    "losses/huber_loss": case(
        lambda x, y: (F.huber_loss(x, y), F.huber_loss(x, y, "none", 0.3)), (FLOATS, FLOATS * 1.2)
    ),
    "losses/soft_margin_loss": case(
        lambda x, y: F.soft_margin_loss(x, y), (FLOATS, FLOATS.flip(0).sign())
    ),
    "losses/kl_div": case(
        lambda x, y: (
            F.kl_div(x, y.clamp(0, 1), reduction="batchmean"),
            F.kl_div(x, -y, reduction="none", log_target=True),
        ),
        (-torch.rand(3, 4), torch.randn(3, 4)),
    ),
    "losses/binary_cross_entropy_with_logits": case(
        lambda x, y: (
            F.binary_cross_entropy_with_logits(x * 9, y),
            F.binary_cross_entropy_with_logits(
                x, y, weight=y + 1, pos_weight=y[0] + 2, reduction="none"
            ),
        ),
        (torch.randn(4, 6), torch.rand(4, 6)),
    ),
    "losses/cross_entropy": case(
        lambda x, y: (
            F.cross_entropy(x, y),
            F.cross_entropy(x, y.clamp(0), x[0, :, 0].exp(), ignore_index=2),
            F.cross_entropy(x, y, reduction="none"),
            F.cross_entropy(x[..., 0], x[..., 1].softmax(1)),
            nn.CrossEntropyLoss(reduction="sum")(x[:, :, 0], y[:, 0]),
        ),
        (torch.randn(4, 3, 5), torch.tensor([[0, 1, 2, -100, 1]] * 4)),
        (torch.randn(4, 3, 5), torch.tensor([[0, 2, 2, -100, -100]] * 4)),
        (torch.randn(4, 3, 5), torch.tensor([[-100] * 5] * 4)),
    ),
    "losses/nll_loss": case(
        lambda x, y: (F.nll_loss(x, y), F.nll_loss(x, y, x[0], reduction="sum")),
        (torch.randn(4, 3), torch.tensor([0, 2, -100, 1])),
    ),
    "layout/getattr": case(lambda x: (x.mT @ x, x.mH + 1), torch.randn(2, 3, 4)),
    "layout/fliplr": case(torch.fliplr, torch.randn(3, 4)),
    "layout/flipud": case(torch.flipud, torch.randn(3, 4)),
    "layout/cat": case(
        lambda x: (
            torch.cat([torch.tensor([]), x[None], x[None] * 2], dim=-1),
            torch.cat((x[:0], x)),
            torch.cat(tensors=[x.new_zeros(0), x[:, None]], dim=1),
        ),
        FLOATS,
    ),
    "layout/column_stack": case(
        lambda x: (torch.column_stack([x, x * 2]), torch.column_stack([x[:, None], x])), FLOATS
    ),
    "layout/unfold": case(
        lambda x: (x.unfold(1, 4, 3) * 2, x.unfold(-1, 2, 1) + 1, -x.unfold(0, size=2, step=2)),
        torch.randn(4, 13, 5),
        torch.randn(7, 4, 5),
    ),
    "layout/select_scatter": case(
        lambda x: (x.select_scatter(x[0] * 2, 0, 1), torch.select_scatter(x, x[:, 0], -1, 2)),
        torch.randn(3, 4),
    ),
    "layout/slice_scatter": case(
        lambda x: (x.slice_scatter(x[:2] * 2, 0, 1, 3), x.slice_scatter(x[:, :2], 1, 0, 4, 2)),
        torch.randn(3, 4),
    ),
    "layout/pad": case(
        lambda x: (F.pad(x, (1, 2), "circular"), F.pad(x, (0, 3, 2, -1), "circular")),
        torch.randn(3, 4, 5),
    ),
    "layout/diag_embed": case(lambda i: torch.diag_embed(odd(i).view(2, 3)), PLACES),
    "layout/msort": case(torch.msort, torch.randn(5, 3)),
    "layout/take": case(
        lambda x, i: x.take(i) + torch.take(x * 2, i),
        (torch.randn(3, 4), torch.tensor([[0, 5], [11, -1]])),
    ),
    "layout/masked_scatter": case(
        lambda x, mask, y: x.masked_scatter(mask, y),
        (torch.randn(3, 4), torch.rand(2, 3, 4) > 0.5, torch.randn(5, 5)),
    ),
    "layout/interpolate": case(
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"), PLANE
    ),
}
# What has no exact replacement is refused.
REFUSED = {
    "integers/gcd": case(lambda x: torch.gcd(x, torch.tensor(6)), torch.arange(1, 9)),
    "operators/interpolate": case(lambda x: F.interpolate(x, size=(1, 1), mode="bilinear"), PLANE),
}


def named(module: Any) -> dict[str, Rewrite]:
    room = module.__name__.rpartition(".")[2]
    names = [getattr(e.targets[0], "__name__", e.targets[0]) for e in module.TABLE]
    assert len(set(names)) == len(names), names
    return {f"{room}/{name}": entry for name, entry in zip(names, module.TABLE, strict=True)}


ENTRIES = {name: entry for module in rewrites._ROOMS for name, entry in named(module).items()}
OF_SIZES = named(sizes)


def test_every_entry_is_in_the_table_and_has_a_case() -> None:
    assert list(rewrites.TABLE) == list(ENTRIES.values())
    assert list(rewrites.SIZES) == list(OF_SIZES.values())
    assert CASES.keys() | REFUSED.keys() == ENTRIES.keys()
    assert SIZE_CASES.keys() | DEPENDENT.keys() == OF_SIZES.keys()


@pytest.mark.parametrize("name", [*ENTRIES, *OF_SIZES])
def test_an_entry_tells_why_and_until_when(name: str) -> None:
    entry = (ENTRIES | OF_SIZES)[name]
    assert len(entry.reason.split()) > 2
    assert entry.until is None or all(part.isdigit() for part in entry.until.split("."))
    assert entry.targets


@pytest.fixture
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an entry that is out of the tables meanwhile."""
    name: str = request.param
    for table in ("TABLE", "SIZES"):
        kept = tuple(e for e in getattr(rewrites, table) if e is not (ENTRIES | OF_SIZES)[name])
        monkeypatch.setattr(rewrites, table, kept)
    return name


def each(names: Any) -> Any:
    return pytest.mark.parametrize("without", list(names), indirect=True)


class Outputs(nn.Module):
    """Gives the tensors of a module's output as a tuple, as tracing wants them."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        made = self.run(*args)
        return tuple(made) if isinstance(made, (tuple, list)) else (made,)


def converted(module: nn.Module, example: tuple[Tensor, ...]) -> Callable[..., list[Tensor]]:
    """The module in OpenVINO, by Dynamo, rewritten, with all sizes open, and not proved.

    Raises:
        CaptureError: OpenVINO refuses.
    """
    args = tuple(x.clone() for x in example)
    for x in args:
        for dim, size in enumerate(x.shape):
            if size != 1:
                decorators.maybe_mark_dynamic(x, dim)
    with dynamo._configured():
        output = convert_frame.fullgraph_capture(module.forward, args, {})
    graph = output.backend_input.graph_module
    rewrites.apply(graph)
    known = dict(output.graph_capture_output.f_globals)
    replay = output.forward_callable(compiled_fn=graph, extra_globals=known)
    traced = frontend.trace(Outputs(lambda *xs: replay(module, *xs)), args)
    model = frontend.convert(traced, [[None] * x.dim() for x in args])
    with tempfile.TemporaryDirectory() as directory:
        # By way of a file, as ovshim does: quotients are exact before, and are not afterwards.
        file = Path(directory, "model.xml")
        runtime.openvino().save_model(model, file, compress_to_fp16=False)
        model = runtime.core().read_model(file)
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        try:
            compiled = runtime.core().compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise CaptureError(compile_failure(error)) from error
        del model

    def run(*inputs: Tensor) -> list[Tensor]:
        made = compiled([x.numpy() for x in inputs])
        return [torch.from_numpy(made[port].copy()) for port in compiled.outputs]

    return run


def is_right(run: Callable[..., list[Tensor]], module: nn.Module, args: tuple[Tensor, ...]) -> bool:
    expected = Outputs(module)(*(x.clone() for x in args))
    try:
        actual = run(*args)
    except RuntimeError:  # some are refused when they run
        return False
    return all(
        one.dtype is other.dtype and one.shape == other.shape and _alike(one, other)
        for one, other in zip(actual, expected, strict=True)
    )


def _alike(one: Tensor, other: Tensor) -> bool:
    if other.dtype.is_floating_point:
        return torch.allclose(one, other, 1e-4, 1e-5, equal_nan=True)
    return torch.equal(one, other)


# Sizes that are open only when another one has been met: eager has the first call of it.
OPENED = {"nearest/interpolate", "layout/unfold"}


@each(CASES)
def test_without_it_openvino_is_wrong_or_refuses(without: str) -> None:
    wanted = CASES[without]
    module = Function(wanted.function).eval()
    try:
        run = converted(module, wanted.example)
    except CaptureError:
        return
    assert not all(is_right(run, module, args) for args in (wanted.example, *wanted.others))


@pytest.mark.parametrize("name", CASES)
def test_with_it_openvino_is_right(name: str) -> None:
    wanted = CASES[name]
    module = Function(wanted.function).eval()
    fast = ovshim.accelerate(module, wanted.example, prefer="openvino", cache_dir=False)
    check(fast, module, *wanted.example)
    for args in wanted.others:
        (settle if name in OPENED else check)(fast, module, *args)


@each(REFUSED)
def test_what_is_refused_would_be_wrong(without: str) -> None:
    module = Function(REFUSED[without].function).eval()
    args = REFUSED[without].example
    assert not is_right(converted(module, args), module, args)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_exact_replacement_is_refused(name: str) -> None:
    module = Function(REFUSED[name].function).eval()
    with pytest.raises(CaptureError) as told:
        converted(module, REFUSED[name].example)
    assert told.value.reason.code == "unsupported-op"


# --- sizes ------------------------------------------------------------------------------------

SIZE_CASES: dict[str, Callable[[Tensor], Any]] = {
    "sizes/sym_min": lambda x: x[:, -min(3, x.shape[1]) :] * 2,
    "sizes/sym_max": lambda x: x * max(6, x.shape[1]),
    "sizes/sym_sum": lambda x: x + sum([x.shape[1], x.shape[1], x.shape[1]]),
    "sizes/sym_float": lambda x: x * float(x.numel()),
    "sizes/_sym_sqrt": lambda x: x / math.sqrt(x.shape[1]),
    "sizes/pow": lambda x: (x * x.shape[1] ** 2, x / x.shape[1] ** 0.5),
    "sizes/mul": lambda x: x.new_zeros(x.shape[1] * 2) + x.repeat(1, 2),
    "sizes/floordiv": lambda x: x[:, : -(-x.shape[1] // 2)] * 2,
    "sizes/mod": lambda x: x * (-x.shape[1] % 3),
    "sizes/floor": lambda x: x[:, : math.floor(x.shape[1] * 0.5)] * 2,
    "sizes/ceil": lambda x: x[:, : math.ceil(x.shape[1] / 2)] * 2,
    "sizes/trunc": lambda x: x[:, : int(x.shape[1] * 1.5) // 2] * 2,
    "sizes/__round__": lambda x: x[:, : round(x.shape[1] / 2)] * 2,
}


def serves(function: Callable[[Tensor], Any], length: int) -> bool:
    """Whether a capture for two rows of five, the second size open, holds for another length."""
    module, x = Function(function).eval(), torch.randn(2, 5)
    leaves, structure = flatten_call((x,), {})
    outputs = tuple(range(len(flatten(module(x))[0])))
    kind = kind_of(leaves, structure)
    dims = (frozenset({1}),)
    request = Request(module, module.forward, kind, leaves, dims, outputs)
    captured = dynamo.capture(request)
    fits = all(size in (None, n) for size, n in zip(captured.pattern[0], (2, length), strict=True))
    return fits and sizes_hold(captured.size_guards, ((2, length),))


@each(SIZE_CASES)
def test_without_it_a_size_is_fixed_or_refused(without: str) -> None:
    try:
        served = serves(SIZE_CASES[without], 9)
    except CaptureError:
        return
    assert not served


@pytest.mark.parametrize("name", SIZE_CASES)
def test_with_it_every_size_is_served(name: str) -> None:
    module = Function(SIZE_CASES[name]).eval()
    fast = ovshim.accelerate(
        module,
        torch.randn(2, 5),
        prefer="openvino",
        cache_dir=False,
        dynamic_shapes=({1: "n"},),
    )
    for length in (5, 4, 7, 12, 33):
        settle(fast, module, torch.randn(2, length))
    assert len(plans(fast)) == 1


# Sizes that depend on values: how many elements a mask selects.
DEPENDENT = {
    "sizes/sym_size.int": case(
        lambda x: x[x > 0].shape[0] * x,
        torch.tensor([-1.0, 2.0, 3.0, 0.0]),
        torch.tensor([-1.0, -2.0, -3.0, 0.0]),
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
    )
}


@each(DEPENDENT)
def test_without_it_the_number_of_the_example_stays(without: str) -> None:
    module = Function(DEPENDENT[without].function).eval()
    with pytest.raises(CaptureError) as told:
        converted(module, DEPENDENT[without].example)
    assert told.value.reason.code == "value-dependent"


@pytest.mark.parametrize("name", DEPENDENT)
def test_with_it_the_number_is_counted_anew(name: str) -> None:
    wanted = DEPENDENT[name]
    module = Function(wanted.function).eval()
    run = converted(module, wanted.example)
    assert all(is_right(run, module, args) for args in (wanted.example, *wanted.others))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x[:, : int(x.shape[1] * 0.29) + 1] * 2, id="an inexact product"),
        pytest.param(lambda x: torch.roll(x, x.shape[1] // 2, 1), id="a plain number"),
        pytest.param(lambda x: x.split(x.shape[1] // 2 + 1, 1)[0] * 2, id="the size of a part"),
        pytest.param(
            lambda x: F.rms_norm(x[:, :3], (3,), None, 1 / x.shape[1]), id="a plain float"
        ),
        pytest.param(lambda x: x * (x.shape[1] * 10**6), id="a product beyond 32 bits"),
        pytest.param(lambda x: x * (3 if x.shape[1] * 0.1 > 0.45 else 4), id="a branch"),
    ],
)
def test_what_cannot_be_carried_through_fixes_the_size(function: Any) -> None:
    assert serves(function, 5)
    assert not serves(function, 9)
    module = Function(function).eval()
    fast = ovshim.accelerate(module, torch.randn(2, 5), prefer="openvino", cache_dir=False)
    for length in (5, 6, 9, 5):
        check(fast, module, torch.randn(2, length), path=None)


# --- invariants -------------------------------------------------------------------------------

SIZE = st.integers(0, 2**31 - 1)
INTEGER = st.integers(-(2**40), 2**40)
DIVISOR = st.integers(-(2**31), 2**31).filter(bool)


@given(SIZE, st.integers(1, 1024))
def test_divisions_of_sizes_are_those_of_numbers(size: int, by: int) -> None:
    made = {
        sizes.floor_division: size // by,
        sizes.modulo: size % by,
        sizes.ceiling_division: -(-size // by),
        sizes.truncated_division: int(Fraction(size, by)),
        sizes.rounded_division: round(Fraction(size, by)),
    }
    for function, expected in made.items():
        assert function(size, by) == expected
        assert type(function(size, by)) is int
        assert torch.equal(function(torch.tensor(size), by), torch.tensor(expected))


@given(INTEGER, INTEGER)
def test_functions_of_sizes_take_numbers_and_tensors(a: int, b: int) -> None:
    for function, expected in ((sizes.smaller, min(a, b)), (sizes.larger, max(a, b))):
        assert function(a, b) == expected
        for one, other in ((torch.tensor(a), b), (a, torch.tensor(b)), (torch.tensor(a),) * 2):
            made = function(one, other)
            assert isinstance(made, Tensor)
            assert made.item() == (a if one is other else expected)
    assert sizes.total((a, b, a)) == a + b + a
    assert sizes.total((torch.tensor(a), b, a)).item() == a + b + a  # type: ignore[union-attr]


@given(st.lists(INTEGER, min_size=1, max_size=8), DIVISOR)
def test_divisions_of_integers_are_eagers(values: list[int], by: int) -> None:
    x = torch.tensor(values)
    for b in (by, torch.tensor(by)):
        assert torch.equal(division.floor_divide(x, b), x // b)
        assert torch.equal(division.remainder(x, b), x % b)
        assert torch.equal(division.truncated_divide(x, b), torch.div(x, b, rounding_mode="trunc"))
        assert torch.equal(division.truncated_remainder(x, b), torch.fmod(x, b))


@given(st.lists(INTEGER, min_size=2, max_size=8))
def test_comparisons_of_integers_are_eagers(values: list[int]) -> None:
    x = torch.tensor(values)
    a, b = x[:, None], x[None]
    assert torch.equal(integers.equal(a, b), a == b)
    assert torch.equal(integers.unequal(a, b), a != b)
    assert torch.equal(integers.less(a, b), a < b)
    assert torch.equal(integers.at_most(a, b), a <= b)
    assert torch.equal(integers.greater(a, b), a > b)
    assert torch.equal(integers.at_least(a, b), a >= b)


NUMBER = st.floats(2.0**-40, 2.0**60, width=32).flatmap(lambda x: st.sampled_from([x, -x]))
TENTHS = st.integers(-(10**4), 10**4).map(lambda n: n / 10)


@settings(max_examples=300)
@given(NUMBER | TENTHS, (NUMBER | TENTHS).filter(bool))
def test_divisions_of_floats_are_eagers(one: float, other: float) -> None:
    a, b = torch.tensor([one]), torch.tensor([other])
    assert torch.equal(division.quotient_of(a, b), a / b)
    assert torch.equal(division._floor(a, b), a // b)
    assert torch.equal(division._cut(a, b), torch.div(a, b, rounding_mode="trunc"))
    if abs(one / other) < 2.0**60:
        assert torch.equal(division._fmod(a, b), torch.fmod(a, b))
        assert torch.equal(division._remainder(a, b), a % b)


@given(st.sampled_from([torch.uint8, torch.int8, torch.int16]), st.lists(st.integers(-300, 300)))
def test_narrow_integers_wrap_as_eagers(dtype: torch.dtype, values: list[int]) -> None:
    x = torch.tensor(values, dtype=torch.int64).to(dtype)
    for function in (torch.add, torch.sub, torch.mul):
        for other in (x.flip(0), 200, -3):
            exact = rewrites.entry.wrapping(function)(x, other)
            assert exact.dtype is dtype
            assert torch.equal(exact, function(x, other))
    assert torch.equal(integers.product(x, 3), x**3)


def test_a_model_that_is_given_labels_runs_whole_and_its_labels_are_looked_at() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    config.intermediate_size = 64
    module = BertForSequenceClassification(config).eval()
    example = {"input_ids": torch.randint(0, 50, (4, 6)), "labels": torch.tensor([0, 2, 1, 1])}
    fast = ovshim.accelerate(module, example, prefer="openvino", cache_dir=False)
    check(fast, module, **example)
    wrong = {**example, "labels": torch.tensor([0, 3, 1, 1])}
    with torch.inference_mode(), pytest.raises(IndexError, match="out of bounds"):
        fast(**wrong)


def test_layers_share_a_mask_that_is_added() -> None:
    """OpenVINO takes one of booleans as well, and is slow at it."""

    def attended(x: Tensor, seen: Tensor) -> Tensor:
        for _ in range(3):
            x = F.scaled_dot_product_attention(x, x, x, seen)
        return x

    module, leaves = Function(attended).eval(), [torch.randn(2, 2, 4, 8), SEEN]
    _, structure = flatten_call(tuple(leaves), {})
    kind = kind_of(leaves, structure)
    request = Request(module, module.forward, kind, leaves, (frozenset({0}),) * 2, (0,))
    model = dynamo.capture(request).model
    layers = [op for op in model.get_ops() if op.get_type_name() == "ScaledDotProductAttention"]
    masks = {op.input_value(3).get_node().get_friendly_name() for op in layers}
    assert len(layers) == 3
    assert len(masks) == 1
    assert {op.input(3).get_element_type().get_type_name() for op in layers} == {"f32"}


@pytest.mark.filterwarnings("ignore::ovshim.FallbackWarning")
@pytest.mark.parametrize("mode", ["replicate", "reflect", "circular"])
def test_padding_that_cuts_off_keeps_its_size(mode: str) -> None:
    module = Function(lambda x: F.pad((x * 2).transpose(1, 2), (-1, 2), mode)).eval()
    fast = ovshim.accelerate(
        module,
        torch.randn(2, 6, 8),
        dynamic_shapes=({1: "n"},),
        prefer="openvino",
        cache_dir=False,
    )
    with torch.no_grad():
        for size in (6, 1, 2, 4):
            x = torch.randn(2, size, 8)
            try:
                usual = module(x)
            except RuntimeError as error:
                with pytest.raises(RuntimeError, match=re.escape(str(error))):
                    fast(x)
            else:
                assert torch.equal(fast(x), usual)
            assert size != 6 or fast.ovshim.stats()["openvino"] == 1


def test_padding_with_the_edge_of_nothing_is_eagers() -> None:
    module = Function(lambda x: F.pad((x * 2).transpose(1, 2), (-2, 3), mode="replicate")).eval()
    x = torch.randn(2, 1, 8)
    with pytest.warns(ovshim.FallbackWarning, match="pad by -2 and 3"):
        fast = ovshim.accelerate(module, x, prefer="openvino", cache_dir=False)
    with torch.no_grad():
        assert torch.equal(fast(x), module(x))


NARROW = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: torch.subtract(x, y),
    "multiply": lambda x, y: x.multiply(y),
    "shift": lambda x, y: x << 2,
    "compared": lambda x, y: x - y > 0,
    "mean of products": lambda x, y: (x * y).float().mean(-1),
    "wider": lambda x, y: (x + y).long().sum(),
    "from 32 bits": lambda x, y: (x.int() * 5).to(x.dtype) / 2,
    "from floats": lambda x, y: (x * 3.5).to(x.dtype) / 2,
    "sum": lambda x, y: x.sum(-1, dtype=x.dtype),
    "running sum": lambda x, y: y.cumsum(-1, dtype=y.dtype),
}


@pytest.mark.parametrize("name", NARROW)
def test_integers_of_16_bits_wrap_although_the_example_does_not_show_it(name: str) -> None:
    module = Function(NARROW[name]).eval()
    small, large = (torch.randint(-n, n, (2, 2, 6), dtype=torch.int16) for n in (9, 2**15 - 1))
    fast = ovshim.accelerate(module, tuple(small), prefer="openvino", cache_dir=False)
    check(fast, module, *small)
    check(fast, module, *large)


def test_means_of_infinities_are_eagers() -> None:
    module = Function(lambda x: x.log().mean(-1)).eval()
    x = torch.rand(2, 9000) + 0.1
    fast = ovshim.accelerate(module, x, prefer="openvino", cache_dir=False)
    check(fast, module, x)
    x[0, 3] = 0.0
    check(fast, module, x)
