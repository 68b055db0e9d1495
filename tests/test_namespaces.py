"""What torch's own functions call by name, replaced for a while."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from checks import check, settle
from modules import make
from torch import Tensor, nn

import ovshim
from ovshim.generation import Generation


class Normalized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x)


def _doubled(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x[..., :1].exp() if kwargs.get("keepdim") else x * 2


REPLACED: dict[str, tuple[type[nn.Module], tuple[Any, ...], Any, str]] = {
    "of torch": (nn.ReLU, (), torch, "relu"),
    "of torch, with weights": (nn.LayerNorm, (8,), torch, "layer_norm"),
    "of torch's C library": (nn.SiLU, (), torch._C._nn, "silu"),
    "of torch.nn.functional": (nn.GELU, (), F, "gelu"),
    "of tensors": (nn.Softmax, (-1,), torch.Tensor, "softmax"),
    "of tensors, by a function": (Normalized, (), torch.Tensor, "norm"),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_patch_is_felt_and_gone(name: str) -> None:
    cls, arguments, space, function = REPLACED[name]
    module, x = nn.Sequential(nn.Linear(8, 8), cls(*arguments)).eval(), torch.randn(3, 8)
    fast = ovshim.accelerate(module, x, prefer="openvino")
    check(fast, module, x)
    with mock.patch.object(space, function, _doubled):
        settle(fast, module, x)
        other = ovshim.accelerate(module, x, prefer="openvino")
        check(other, module, x)
    for each in (fast, other):
        settle(each, module, x)


def test_an_import_that_writes_there_is_no_change() -> None:
    made = Generation(make(nn.Linear, 8, 8))
    assert made.holds()
    with mock.patch.object(torch, "_of_nobody", 1, create=True):
        assert made.holds()
    assert made.holds()


def test_plans_share_what_they_compare_with() -> None:
    from ovshim import namespaces

    first = [namespaces._looked_up(space) for space in namespaces.SPACES]
    assert sum(len(called) for called, _ in first) > 1000
    again = [namespaces._looked_up(space) for space in namespaces.SPACES]
    assert all(one is other for one, other in zip(first, again, strict=True))
