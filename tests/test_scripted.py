"""Modules of TorchScript inside of others: what they hold is in objects of C++."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import check, counts, quietly
from torch import Tensor, nn

import ovshim


class Inner(nn.Module):
    factor: float

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0
        self.numbers = [1.0, 2.0]
        self.shift = torch.ones(4)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) * self.factor * self.scale + self.shift + self.numbers[0]
        return y + 1 if self.training else y


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.inner = torch.jit.script(Inner().eval())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


def _assigned(inner: Any) -> None:
    inner.load_state_dict({k: v * 3 for k, v in inner.state_dict().items()}, assign=True)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an attribute": lambda s: setattr(s, "factor", 3.0),
    "a list": lambda s: setattr(s, "numbers", [5.0, 6.0]),
    "a tensor": lambda s: setattr(s, "shift", torch.full((4,), 7.0)),
    "in a tensor": lambda s: s.shift.add_(1),
    "a parameter": lambda s: setattr(s.linear, "weight", nn.Parameter(torch.ones(4, 4))),
    "a buffer": lambda s: setattr(s, "scale", torch.full((4,), 2.0)),
    "in a parameter": lambda s: s.linear.weight.mul_(2),
    "all of a state": _assigned,
    "training": lambda s: s.train(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_in_a_scripted_submodule_is_noticed(name: str) -> None:
    module, x = Outer().eval(), torch.randn(2, 4)
    with torch.no_grad():
        fast = ovshim.accelerate(module, x, prefer="openvino")
        torch.testing.assert_close(fast(x), module(x))
        assert counts(fast)["openvino"] == 1
        before = Outer.forward(fast, x)
        CHANGES[name](fast.inner)
        assert not torch.allclose(Outer.forward(fast, x), before)
        for _ in range(3):
            torch.testing.assert_close(fast(x), Outer.forward(fast, x))


def test_calls_that_change_nothing_are_served() -> None:
    module, x = Outer().eval(), torch.randn(2, 4)
    with torch.no_grad():
        fast = ovshim.accelerate(module, x, prefer="openvino")
        _ = fast.inner.factor, str(fast.inner), list(fast.parameters()), fast.inner.state_dict()
        fast.inner.eval()
        for n in range(1, 5):
            torch.testing.assert_close(fast(x), module(x))
            assert counts(fast)["openvino"] == n


class HoldsFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.frozen = torch.jit.freeze(torch.jit.script(nn.Linear(4, 4).eval()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.frozen(self.linear(x))
        return y


def test_frozen_ones_are_served_within_others_and_refused_alone() -> None:
    module = HoldsFrozen().eval()
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(3, 4), prefer="openvino")
        check(fast, module, torch.randn(5, 4), path=None)
    assert counts(fast)["eager"] == 0
    with pytest.raises(ovshim.OptionError, match="freeze"):
        ovshim.accelerate(module.frozen)
