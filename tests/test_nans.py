"""NaNs and infinities that arise inside of a graph, where OpenVINO would make numbers of them."""

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
    "division and relu": lambda x: F.relu(x / F.relu(x)),
}


@pytest.mark.parametrize("name", LOST)
def test_a_nan_made_inside_is_eagers(name: str) -> None:
    module = Function(LOST[name]).eval()
    fast = ovshim.accelerate(module, X, prefer="openvino", cache_dir=False)
    check(fast, module, X.flip(0))
    with torch.no_grad():
        assert torch.equal(fast(-X).nan_to_num(7), module(-X).nan_to_num(7))
    assert fast.ovshim.stats()["eager"] == 1


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
