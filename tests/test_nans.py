"""NaNs and infinities that arise inside of a graph, where OpenVINO would make numbers of them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import check
from modules import Function
from torch import Tensor

import ovshim

torch.manual_seed(0)
WEIGHT = torch.randn(4, 4)
X = torch.rand(3, 4) + 0.1
EDGES = torch.tensor([-1.0, 0.0, 1.0])
PLACES = torch.arange(4).expand(3, 4)


LOST: dict[str, Callable[[Tensor], Any]] = {
    "log and relu": lambda x: F.relu(x.log()),
    "root and clamp": lambda x: x.sqrt().clamp(min=0.5),
    "root and normalize": lambda x: F.normalize(x.sqrt(), dim=1),
    "log and softmax": lambda x: x.log().softmax(1),
    "log and comparison": lambda x: torch.where(x.log() > 0, x, -x),
    "log and maximum": lambda x: torch.maximum(x.log(), x),
    "log and places": lambda x: x.log().argmax(1),
    "log1p, a layer and relu": lambda x: F.relu(F.linear(torch.log1p(x * 9), WEIGHT)),
    "power and relu": lambda x: F.relu(x**0.5),
    "power by name": lambda x: torch.pow(x, exponent=0.5).clamp(min=0.5),
    "root by name": lambda x: torch.sqrt(input=x).clamp(min=0.5),
    "divisor by name": lambda x: F.relu(x / torch.sqrt(input=x * (x > 0))),
    "negative power by name": lambda x: F.relu(x * F.relu(x).pow(exponent=-0.5) * 0),
    "product by name": lambda x: F.relu(x / torch.mul(F.relu(x), other=x)),
    "division and relu": lambda x: F.relu(x / F.relu(x)),
    "whole division and relu": lambda x: F.relu(x // F.relu(x)),
    "logit and relu": lambda x: F.relu(torch.logit(x / 2)),
    "erfinv and relu": lambda x: F.relu(torch.erfinv(x.where(x > 0, 2.0) / 2 + (x < 0))),
    "log and log_softmax": lambda x: x.log().log_softmax(1),
    "log and softmin": lambda x: F.softmin(x.log(), 1),
    "log and celu": lambda x: F.celu(x.log()),
    "root and exp": lambda x: x.sqrt().exp(),
    "root and expm1": lambda x: x.sqrt().expm1(),
    "log and a loss": lambda x: F.cross_entropy(x.log(), torch.tensor([0, 1, 2])),
    "log and clamp in place": lambda x: (x.log().clamp_min_(0.1), x.log().clamp_max_(0.1)),
    "log and hardtanh in place": lambda x: F.hardtanh_(x.log()),
    "log and greater": lambda x: torch.greater(x.log(), 0),
    "log and greater_equal": lambda x: torch.greater_equal(x.log(), 0),
    "log and logical_not": lambda x: torch.logical_not(x.log()),
    "log and logical_and": lambda x: torch.logical_and(x.log(), x),
    "log and all": lambda x: x.log().all(1),
    "log and any": lambda x: x.log().any(1),
    "log and searchsorted": lambda x: torch.searchsorted(EDGES, x.log()),
    "log and bucketize": lambda x: torch.bucketize(x.log(), EDGES),
    "log and scatter_reduce": lambda x: x.scatter_reduce(1, PLACES, x.log(), "amax"),
    "log and logaddexp": lambda x: torch.logaddexp(x.log(), x),
    "log and kthvalue": lambda x: x.log().kthvalue(2, 1)[0],
    "log and the largest": lambda x: x.log().norm(p=torch.inf, dim=1),
    "log and to bool": lambda x: (x.log().to(torch.bool), x.log().type(torch.bool)),
}


@pytest.mark.parametrize("name", LOST)
def test_a_nan_made_inside_is_eagers(name: str) -> None:
    module = Function(LOST[name]).eval()
    fast = ovshim.accelerate(module, X, prefer="openvino", cache_dir=False)
    check(fast, module, X.flip(0))
    with torch.no_grad():
        torch.testing.assert_close(fast(-X), module(-X), rtol=0, atol=0, equal_nan=True)
    assert fast.ovshim.stats()["eager"] == 1


def _entropy(x: Tensor) -> Tensor:
    shares = (x * 100).softmax(-1)
    return -(shares * shares.log()).sum(-1)


def _length(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)


FROM_0: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "rms norm": (lambda x: x * x.pow(2).mean(-1, keepdim=True).rsqrt(), X * 0),
    "power of -1": (lambda x: x * _length(x) ** -1, X * 0),
    "power of -2": (lambda x: x * _length(x).pow(-2), X * 0),
    "power of -0.5": (lambda x: x * _length(x) ** -0.5, X * 0),
    "reciprocal": (lambda x: x * _length(x).reciprocal(), X * 0),
    "entropy": (_entropy, X * 100 - 5),
    "turned entropy": (lambda x: x * -x.log()[:, None, :], X * 0),
    "chosen by something else": (
        lambda x: torch.where(x.sum(-1, keepdim=True) > -100, x / _length(x), 0.0),
        X * 0,
    ),
    "division by integers": (lambda x: x / (x > 0).sum(1, keepdim=True), X * 0),
}


@pytest.mark.parametrize("name", FROM_0)
def test_an_infinity_that_comes_to_0_is_eagers(name: str) -> None:
    function, wrong = FROM_0[name]
    module = Function(lambda x: F.relu(function(x))).eval()
    fast = ovshim.accelerate(module, X / 100, prefer="openvino", cache_dir=False)
    check(fast, module, X.flip(0) / 100)
    with torch.no_grad():
        torch.testing.assert_close(fast(wrong), module(wrong), rtol=0, atol=0, equal_nan=True)
    assert fast.ovshim.stats()["eager"] == 1


GROWN: dict[str, tuple[Callable[[Tensor, Tensor], Any], float]] = {
    "logarithms": (lambda x, y: F.relu(x.log() - y.log().neg().neg()), 0.0),
    "division by name": (lambda x, y: torch.addcdiv(x, x, y).clamp(-1, 1), 0.0),
    "NaN by hand": (lambda x, y: F.relu(x.masked_fill(y > 90, math.nan)), 100.0),
    "NaN chosen": (lambda x, y: torch.where(x > 90, math.nan, y) > 0, 100.0),
    "difference": (lambda x, y: (x.exp() - y.exp()[:, None, :].squeeze(1)).clamp(-1, 1), 100.0),
    "ratio": (lambda x, y: F.relu(x.exp() / y.exp()), 100.0),
    "product with 0": (lambda x, y: F.relu(x.exp() * (y < 90)), 100.0),
    "matrix product": (lambda x, y: F.relu(x.exp() @ (y < 90).float().T), 100.0),
    "softmax": (lambda x, y: torch.softmax(x.exp() + 0 * y, -1), 100.0),
    "less what is no largest": (
        lambda x, y: F.relu((x + y.amax()).exp() - (x - y.clamp_max(3.0)).exp()),
        100.0,
    ),
    "layer norm": (lambda x, y: F.relu(F.layer_norm(x.exp(), (4,))) + 0 * y, 100.0),
}


@pytest.mark.parametrize("name", GROWN)
def test_infinities_that_meet_are_eagers(name: str) -> None:
    function, edge = GROWN[name]
    module = Function(function).eval()
    fast = ovshim.accelerate(module, (X, X.clone()), prefer="openvino", cache_dir=False)
    check(fast, module, X.flip(0), X)
    grown = X.index_fill(1, torch.tensor([2]), edge)
    with torch.no_grad():
        torch.testing.assert_close(fast(grown, grown), module(grown, grown), equal_nan=True)
    assert fast.ovshim.stats()["eager"] == 1


BOUNDED: dict[str, Callable[[Tensor], Any]] = {
    "a sigmoid by hand": lambda x: F.relu(x * (1 / (1 + (-x * 100).exp()))),
    "a limited exponent": lambda x: F.relu(x * x.clamp(max=4.0).exp()),
    "below 0": lambda x: F.relu(x * (-(x**2) / 2).exp()),
    "of a weight": lambda x: F.relu(x * WEIGHT[:3].exp()),
    "less the largest": lambda x: F.relu(x * (x - x.amax(1, keepdim=True)).exp()),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_exponentials_that_cannot_meet_are_not_asked_about(name: str) -> None:
    module, x = Function(BOUNDED[name]).eval(), X * torch.tensor([[1.0], [-900.0], [1.0]])
    fast = ovshim.accelerate(module, X, prefer="openvino", cache_dir=False)
    check(fast, module, x)


def _degrees(x: Tensor) -> Tensor:
    inverse = x.sum(1).pow(-0.5)
    inverse.masked_fill_(inverse == torch.inf, 0)
    return F.relu(inverse[:, None] * x)


HARMLESS: dict[str, Callable[[Tensor], Any]] = {
    "degrees of a graph": _degrees,
    "an additive mask": lambda x: (x @ x.T + x.log().neg().neg()[:, :3]).relu(),
    "a mask added to products": lambda x: torch.baddbmm(
        x.log()[:, None, :], x[:, :, None], x[:, None, :]
    ).relu(),
    "infinity and relu": lambda x: F.relu(x.rsqrt()),
    "masked mean": lambda x: F.relu(x / (x > 0).sum(1, keepdim=True).clamp(min=1e-9)),
    "chosen": lambda x: F.relu(torch.where(x == 0, 0, x / x)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_0_that_makes_no_nan_is_served(name: str) -> None:
    module = Function(HARMLESS[name]).eval()
    fast = ovshim.accelerate(module, X, prefer="openvino", cache_dir=False)
    with torch.no_grad():
        x = X * torch.tensor([[1.0], [0.0], [1.0]])
        torch.testing.assert_close(fast(x), module(x))
    assert fast.ovshim.stats()["openvino"] == 1


def test_a_maximum_over_what_is_masked_as_a_whole_is_eagers() -> None:
    def pooled(x: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        masked = F.linear(x, WEIGHT).masked_fill(hidden[..., None], -torch.inf)
        return masked.amax(1), masked.max(1)[0], F.max_pool1d(masked.transpose(1, 2), 3)

    module, x = Function(pooled).eval(), torch.randn(2, 3, 4)
    some = torch.tensor([[False, False, True], [False, True, True]])
    fast = ovshim.accelerate(module, (x, some), prefer="openvino", cache_dir=False)
    check(fast, module, x, some.flip(0))
    whole = torch.tensor([[False, False, True], [True, True, True]])
    with torch.no_grad():
        for one, other in zip(fast(x, whole), module(x, whole), strict=True):
            assert torch.equal(one, other)
    assert fast.ovshim.stats()["eager"] == 1


def test_a_maximum_of_logarithms_of_0_is_eagers() -> None:
    module = Function(lambda x: x.log().amax(1)).eval()
    fast = ovshim.accelerate(module, X, prefer="openvino", cache_dir=False)
    check(fast, module, X.flip(0))
    with torch.no_grad():
        assert torch.equal(fast(X * 0), module(X * 0))
    assert fast.ovshim.stats()["eager"] == 1


def test_what_is_chosen_among_or_cannot_arise_is_not_asked_about() -> None:
    def usual(x: Tensor) -> tuple[Tensor, ...]:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return F.relu(F.linear(normed, WEIGHT)), torch.where(x > 0, x.log(), 0.0).relu()

    module = Function(usual).eval()
    fast = ovshim.accelerate(module, X - 0.4, prefer="openvino", cache_dir=False)
    check(fast, module, 0.4 - X)


def test_a_minimum_of_what_was_cast_is_of_integers() -> None:
    """As a T5 has its positions."""

    def places(x: Tensor) -> Tensor:
        far = (x.log() * 2).to(torch.long)
        return torch.min(far, torch.full_like(far, 3)) + x

    module = Function(places).eval()
    fast = ovshim.accelerate(module, X * 9, prefer="openvino", cache_dir=False)
    check(fast, module, X.flip(0) * 9)


def _of_two(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum(-1, keepdim=True)


def _of_one(x: Tensor) -> Tensor:
    e = torch.exp(x)
    return torch.div(e, torch.sum(e, dim=1)[:, None])


def _written_twice(x: Tensor) -> Tensor:
    return torch.exp(x * 2 / 2) / torch.exp(x * 2 / 2).sum(-1, keepdim=True)


def _inverted(x: Tensor) -> Tensor:
    e = x.exp()
    return (1 / e.sum(1, keepdim=True)) * e


def _less_the_largest_of_all(x: Tensor) -> Tensor:
    e = (x - x.max()).exp()
    return e / e.sum(1, keepdim=True)


BY_HAND = {
    "of two exponentials": _of_two,
    "of one exponential": _of_one,
    "of an inverse": _inverted,
    "of two expressions": _written_twice,
    "less the largest of all": _less_the_largest_of_all,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_softmax_by_hand_overflows_as_eagers(name: str) -> None:
    module = Function(BY_HAND[name]).eval()
    fast = ovshim.accelerate(module, X, prefer="openvino", cache_dir=False)
    check(fast, module, X.flip(0))
    with torch.no_grad():
        for edge in (95.0, -125.0):
            x = X + torch.tensor([[0.0], [edge], [0.0]])
            torch.testing.assert_close(fast(x), module(x), equal_nan=True)
    assert fast.ovshim.stats()["openvino"] == 1


def test_a_softmax_less_the_largest_is_served() -> None:
    def stable(x: Tensor) -> tuple[Tensor, ...]:
        e, f = (x - x.amax(-1, True)).exp(), torch.exp(x - x.max(dim=1, keepdim=True).values)
        return e / e.sum(1, keepdim=True), f / f.sum(-1, True)

    module = Function(stable).eval()
    fast = ovshim.accelerate(module, X, prefer="openvino", cache_dir=False)
    for edge in (95.0, -125.0):
        check(fast, module, X + torch.tensor([[0.0], [edge], [0.0]]))
