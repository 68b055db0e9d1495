"""What a module asks of tensors that no graph tells: which it is, how it lies in memory, whether
gradients reach it. However it asks, the next call is answered anew."""

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import check, counts, plans, quietly
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

import ovshim

LAST = torch.channels_last

NOTHING = torch.full((1,), -1.0)


class Began(nn.Module):
    """Does otherwise for the very tensor that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("start", torch.zeros(3, 4))

    def forward(self, x: Tensor, state: Tensor, bias: Tensor = NOTHING) -> Tensor:
        y: Tensor = self.linear(x)
        y = y if bias is NOTHING else y + bias
        return y if state is self.start else y + self.linear(state)


def test_a_tensor_that_the_module_holds_is_told_from_others() -> None:
    module, x, state = Began().eval(), torch.randn(3, 4), torch.randn(3, 4)
    fast: Any
    with quietly(), torch.no_grad():
        fast = ovshim.accelerate(module, (x, state), prefer="openvino")
        for given in (state, module.start, x):
            assert torch.allclose(fast(x, given), module(x, given), atol=1e-5)  # type: ignore[arg-type]
            for bias in (NOTHING, torch.ones(1)):
                expected = module(x, given, bias)  # type: ignore[arg-type]
                assert torch.allclose(fast(x, given, bias), expected, atol=1e-5)


class Itself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        y: Tensor = self.linear(q)
        return y if q is k else y + k


def test_tensors_of_one_call_may_be_compared() -> None:
    module, x = Itself().eval(), torch.randn(3, 4)
    fast = ovshim.accelerate(module, (x, x), prefer="openvino")
    check(fast, module, x, x)
    fast.ovshim.warm((x, torch.randn(3, 4)))  # type: ignore[operator, union-attr]
    check(fast, module, x, torch.randn(3, 4))
    check(fast, module, x, x)


class Helper:
    """An object of the program's, no module."""

    def stride(self, x: Tensor) -> int:
        return x.stride(1)

    def flag(self, weight: Tensor) -> bool:
        return weight.requires_grad


HELPER = Helper()


class Asks(nn.Module):
    """[batch, channels, height, width] -> the same, by what it asks of the input."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3)
        self.ask = ask

    @staticmethod
    def static(x: Tensor) -> int:
        return x.stride(1)

    @property
    def asking(self) -> Callable[[Tensor], int]:
        return lambda x: x.stride(1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y * (1 + self.ask(self, x))


def unbound(_: Any, x: Tensor) -> int:
    stride = x.stride
    return stride(1)


STRIDES: dict[str, Callable[..., Any]] = {
    "a method": lambda _, x: x.stride(1),
    "a method's value": unbound,
    "by name": lambda _, x: getattr(x, "stri" + "de")(1),
    "an object's method": lambda _, x: HELPER.stride(x),
    "a static method": lambda module, x: module.static(x),
    "a property": lambda module, x: module.asking(x),
    "torch's code": lambda _, x: suggest_memory_format(x) is LAST,
    "of what is computed": lambda _, x: x.mul(2).stride(1),
    "contiguous": lambda _, x: x.is_contiguous(memory_format=LAST),
}


@pytest.mark.parametrize("name", STRIDES)
def test_strides_however_they_are_asked_for(name: str) -> None:
    module, x = Asks(STRIDES[name]).eval(), torch.randn(2, 1, 6, 6)
    other = torch.randn(2, 1, 6, 6).to(memory_format=LAST)
    assert other.stride() != x.stride()
    with quietly():
        fast = ovshim.accelerate(module, x, prefer="openvino")
        for _ in range(2):
            check(fast, module, x)
            check(fast, module, other, path=None)
    assert counts(fast)["openvino"] == 2


def test_strides_that_nobody_asks_for_are_not_watched() -> None:
    module, x = Asks(lambda module, x: module.conv.stride[0]).eval(), torch.randn(2, 1, 6, 6)
    fast = ovshim.accelerate(module, x, prefer="openvino")
    check(fast, module, x)
    check(fast, module, torch.randn(2, 1, 6, 6).to(memory_format=LAST))


def test_the_strides_asked_for_are_known_of_a_cached_graph() -> None:
    module, x = Asks(STRIDES["a property"]).eval(), torch.randn(2, 1, 6, 6)
    ovshim.accelerate(module, x, prefer="openvino")
    with quietly():
        fast = ovshim.accelerate(copy.deepcopy(module), x, prefer="openvino")
        assert plans(fast)[0]["cache"] == "hit"
        check(fast, module, x)
        check(fast, module, torch.randn(2, 1, 6, 6).to(memory_format=LAST), path=None)
    assert counts(fast)["openvino"] == 1


class Flagged(nn.Module):
    """Goes another way where its weight is trained."""

    def __init__(self, ask: Callable[..., bool]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.ask = ask

    @staticmethod
    def static(weight: Tensor) -> bool:
        return weight.requires_grad

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y * (3 if self.ask(self, self.linear.weight) else 2)


FLAGS: dict[str, Callable[..., bool]] = {
    "an attribute": lambda _, weight: weight.requires_grad,
    "an object's method": lambda _, weight: HELPER.flag(weight),
    "a static method": lambda module, weight: module.static(weight),
    "by name": lambda _, weight: getattr(weight, "requires_" + "grad"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_however_they_are_asked_for(name: str) -> None:
    module, x = Flagged(FLAGS[name]).eval(), torch.randn(3, 4)
    with torch.no_grad(), quietly():
        fast = ovshim.accelerate(module, x, prefer="openvino")
        check(fast, module, x)
        for trained in (False, True, False):
            module.linear.weight.requires_grad_(trained)
            for _ in range(2):
                check(fast, module, x, path=None)


KEY = torch.zeros(3, 4)
MEMO = {KEY: 2.0}


class Identifies(nn.Module):
    def __init__(self, ask: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("start", torch.zeros(3, 4))
        self.ask = ask

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y * 2 if self.ask(self, state) else y + 1


IDENTITIES: dict[str, Callable[..., Any]] = {
    "a key": lambda _, state: state in MEMO,
    "a key's value": lambda _, state: MEMO.get(state),
    "a set": lambda _, state: state in {KEY},
    "an id": lambda module, state: id(state) == id(module.start),
    "a hash": lambda module, state: hash(state) == hash(module.start),
    "an operator": lambda module, state: operator.is_(state, module.start),
    "itself, of its dtype": lambda module, state: state.float() is module.start,
    "itself, contiguous": lambda _, state: state.contiguous() is KEY,
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_a_tensor_is_told_from_others_however_it_is_asked_for(name: str) -> None:
    module, x = Identifies(IDENTITIES[name]).eval(), torch.randn(3, 4)
    fast: Any
    with quietly(), torch.no_grad():
        fast = ovshim.accelerate(module, (x, torch.zeros(3, 4)), prefer="openvino")
        for state in (torch.zeros(3, 4), module.start, KEY):
            expected = module(x, state)  # type: ignore[arg-type]
            assert torch.allclose(fast(x, state), expected, atol=1e-5)


def test_keys_that_the_module_holds_are_no_question() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            gain = {self.one.weight: 2.0, self.two.weight: 3.0}
            y: Tensor = self.one(x) * gain[self.one.weight] + self.two(x)
            return y

    module, x = Table().eval(), torch.randn(3, 4)
    check(ovshim.accelerate(module, x, prefer="openvino"), module, x)


def test_the_storage_behind_an_input_is_of_each_call() -> None:
    class Stored(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2.0 + x.untyped_storage().size()

    module, x = Stored().eval(), torch.randn(2, 4)
    with quietly():
        fast = ovshim.accelerate(module, x, prefer="openvino")
        for given in (x, torch.randn(9, 4)[:2]):
            check(fast, module, given, path="eager")
