"""The mixed way: submodules in OpenVINO under a parent that stays in eager."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import check, counts, falls_back, plans, quietly, same, served
from modules import Mlp, make
from torch import Tensor, nn

import ovshim
from ovshim.race import Finish


class Tower(nn.Module):
    """[batch, 8] → [batch, 4]: three blocks, and `between` after each of the first two."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(8, 16, 8) for _ in range(2)])
        self.named = nn.ModuleDict({"last": nn.Sequential(nn.Linear(8, 4), nn.ReLU())})
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.between(block(x))
        y: Tensor = self.named["last"](x)
        return y


def branch(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x - 1


def unsupported(x: Tensor) -> Tensor:
    return x + torch.histc(x, bins=8, min=-1.0, max=1.0)


def noise(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


WAYS = [
    pytest.param(branch, "value-dependent", id="branch"),
    pytest.param(unsupported, "unsupported-op", id="operator"),
    pytest.param(noise, "random", id="random"),
]
EVERY_PART = ["blocks.0", "blocks.1", "named.last"]


def tower(between: Callable[[Tensor], Tensor], **options: Any) -> tuple[nn.Module, nn.Module]:
    module = make(Tower, between)
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino", **options)
    return module, fast


def parts(fast: nn.Module) -> list[str]:
    (plan,) = plans(fast)
    return [part["module"] for part in plan["parts"]]


@pytest.mark.parametrize(("between", "code"), WAYS)
def test_the_largest_parts_run_in_openvino(between: Any, code: str) -> None:
    module, fast = tower(between)
    for x in (torch.ones(3, 8), -torch.ones(3, 8), torch.randn(5, 8), torch.randn(1, 8)):
        check(fast, module, x, path="mixed")
    (plan,) = plans(fast)
    assert plan["path"] == "mixed"
    assert plan["reason"]["code"] == code
    assert parts(fast) == EVERY_PART
    for part in plan["parts"]:
        (inner,) = part["plans"]
        assert inner["path"] == "openvino"
        assert inner["calls"] >= 4


def test_of_a_part_that_cannot_run_the_parts_below_are_taken() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = Tower(branch)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.tower(x))
            return y

    module = make(Outer)
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    check(fast, module, torch.randn(3, 8), path="mixed")
    assert parts(fast) == [*(f"tower.{name}" for name in EVERY_PART), "head"]


def test_the_users_trees_are_not_touched() -> None:
    module, fast = tower(branch)
    for tree in (module, fast):
        for name, inner in tree.named_modules():
            assert name == "" or "forward" not in inner.__dict__
            assert not inner._forward_hooks
            assert not inner._forward_pre_hooks


def test_a_fallback_in_part_is_told_once() -> None:
    module = make(Tower, branch)
    with falls_back("value-dependent") as told:
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
        check(fast, module, torch.randn(3, 8), path="mixed")
    assert "in part" in str(told[0])
    assert "3 submodules in OpenVINO" in str(ovshim.explain(fast))
    assert "blocks.1 (Mlp)" in str(ovshim.explain(fast))


def test_strict_takes_no_parts() -> None:
    with pytest.raises(ovshim.FallbackError):
        ovshim.accelerate(make(Tower, branch), torch.randn(3, 8), prefer="openvino", strict=True)


def test_without_parameters_called_there_is_no_part() -> None:
    module = make(Tower, branch)
    module.blocks = nn.ModuleList([nn.ReLU(), nn.Tanh()])
    module.named["last"] = nn.Identity()
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    check(fast, module, torch.randn(3, 8), path="eager", reason="value-dependent")


def test_weights_that_change_are_seen_by_the_parts() -> None:
    module, fast = tower(branch)
    with torch.no_grad():
        module.blocks[0].first.weight.mul_(2)
    with quietly():
        check(fast, module, torch.randn(3, 8), path=None)
        check(fast, module, torch.randn(3, 8), path="mixed")


def test_a_part_that_is_replaced_is_seen() -> None:
    module, fast = tower(branch)
    with quietly():
        fast.blocks[1] = make(Mlp, 8, 16, 8)  # type: ignore[operator, index]
        other = copy.deepcopy(module)
        other.blocks[1].load_state_dict(fast.blocks[1].state_dict())  # type: ignore[index, union-attr]
        check(fast, other, torch.randn(3, 8), path=None)
        check(fast, other, torch.randn(3, 8), path="mixed")


class Holds(nn.Module):
    """A tower whose forward reaches modules by plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower(branch)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.listed: Any = []
        self.named: Any = {}
        self.beside: Any = torch.neg

    def forward(self, x: Tensor) -> Tensor:
        x = self.tower(x) + x[:, :4]
        for inner in (*self.listed, *self.named.values()):
            if isinstance(inner, dict):
                x = x * inner["gain"]
            for module in inner if isinstance(inner, list) else (inner,):
                x = torch.tanh(module(x) if isinstance(module, nn.Module) else x)
        y: Tensor = self.beside(x)
        return y


def block() -> nn.Module:
    return make(nn.Sequential, nn.Linear(4, 4), nn.Tanh())


def hold(**attributes: Callable[[Any], Any]) -> nn.Module:
    module = make(Holds)
    for name, made in attributes.items():
        module.__dict__[name] = made(module)
    return module


Held = Callable[[Any], Any]
# What an attribute holds, a change of it, and whether the module is divided.
HELD: dict[str, tuple[dict[str, Held], Callable[[Any], Any], bool]] = {
    "a layer of a module in a list": (
        {"listed": lambda m: [block()]},
        lambda m: m.listed[0].__setitem__(1, nn.Identity()),
        False,
    ),
    "a hook on a module in a list": (
        {"listed": lambda m: [block()]},
        lambda m: m.listed[0].register_forward_hook(lambda module, args, y: y + 1),
        False,
    ),
    "the forward of a module in a list": (
        {"listed": lambda m: [block()]},
        lambda m: setattr(m.listed[0], "forward", torch.neg),
        False,
    ),
    "an attribute of a module in an attribute": (
        {"beside": lambda m: make(nn.LeakyReLU, 0.5)},
        lambda m: setattr(m.beside, "negative_slope", -3.0),
        False,
    ),
    "a module in a list in a dict": (
        {"named": lambda m: {"m": [m.one]}},
        lambda m: m.named["m"].__setitem__(0, nn.Tanh()),
        False,
    ),
    "a module in a list in a tuple": (
        {"listed": lambda m: ([m.one],)},
        lambda m: m.listed[0].__setitem__(0, nn.Tanh()),
        False,
    ),
    "a number in a dict in a dict": (
        {"named": lambda m: {"n": {"mod": m.one, "gain": 1.0}}},
        lambda m: m.named["n"].__setitem__("gain", 3.0),
        False,
    ),
    "the type of a number beside a module": (
        {"listed": lambda m: [m.one, {"gain": 1}]},
        lambda m: m.listed.__setitem__(1, {"gain": 1.5}),
        False,
    ),
    "a list of the tree's modules": (
        {"listed": lambda m: [m.one, m.two]},
        lambda m: m.listed.reverse(),
        True,
    ),
    "a tuple of the tree's modules": (
        {"listed": lambda m: (m.one, m.two)},
        lambda m: setattr(m, "listed", m.listed[::-1]),
        True,
    ),
    "the order of a dict": (
        {"named": lambda m: {"a": m.one, "b": m.two}},
        lambda m: m.named.__setitem__("a", m.named.pop("a")),
        True,
    ),
    "the order of an OrderedDict": (
        {"named": lambda m: OrderedDict(a=m.one, b=m.two)},
        lambda m: m.named.move_to_end("a"),
        True,
    ),
    "a part of the tree": (
        {"listed": lambda m: [1.0, "a"]},
        lambda m: setattr(m.tower.blocks, "0", nn.Identity()),
        True,
    ),
}


# Those that leave the parts in place take a build of each.
QUICK = ("a list of the tree's modules", "a part of the tree")
FEW_HELD = [
    pytest.param(name, marks=pytest.mark.slow) if divided and name not in QUICK else name
    for name, (_, _, divided) in HELD.items()
]


@pytest.mark.parametrize("name", FEW_HELD)
def test_a_change_of_what_attributes_hold_is_seen(name: str) -> None:
    attributes, change, divided = HELD[name]
    module, x = hold(**attributes), torch.randn(3, 8)

    def eager(x: Tensor) -> Any:
        with ovshim.disabled():
            return module(x)

    with quietly():
        fast = ovshim.accelerate(module, x, prefer="openvino", inplace=True)
        check(fast, eager, x, path="mixed" if divided else "eager")
        before = eager(x)
        change(module)
        assert not torch.allclose(before, eager(x))
        check(fast, eager, x, path=None)
        check(fast, eager, x, path=None)
        check(fast, eager, x, path="mixed" if divided else "eager")


def test_a_hook_on_a_part_fires() -> None:
    module, fast = tower(branch)
    seen: list[nn.Module] = []
    fast.blocks[0].register_forward_hook(lambda m, a, y: seen.append(m))  # type: ignore[index, union-attr]
    with quietly():
        check(fast, module, torch.randn(3, 8), path="eager", reason="inner-hooks")
    assert seen == [fast.blocks[0]]  # type: ignore[index]


class Settles(nn.Module):
    """Goes over to something else at its first call of more than four rows, and keeps a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Mlp(8, 16, 8)
        self.doubles, self.kept = False, None

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if x.shape[1] > 4:
            self.doubles, self.kept = True, self.block
        y: Tensor = branch(self.block(x))
        y = y if scale is None else y * scale
        return y * 2 if self.doubles else y


def test_what_a_later_call_writes_to_attributes_is_the_users() -> None:
    module = make(Settles)
    reference = copy.deepcopy(module)
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(2, 3, 8), prefer="openvino")
        check(fast, reference, torch.randn(2, 3, 8), path="mixed")
        check(fast, reference, torch.randn(2, 6, 8), path="mixed")
        assert fast.doubles
        assert fast.kept is fast.block
        for scale in (None, torch.tensor(3.0), torch.tensor(3.0)):
            check(fast, reference, torch.randn(2, 3, 8), scale, path=None)
    assert counts(fast)["mixed"] >= 2


def test_what_the_module_raises_between_its_parts_is_raised() -> None:
    def demanding(x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ArithmeticError("a NaN")
        return x

    module, fast = tower(demanding)
    check(fast, module, torch.randn(3, 8), path="mixed")
    with torch.inference_mode(), pytest.raises(ArithmeticError, match="a NaN"):
        fast(torch.full((3, 8), float("nan")))


def test_gradients_are_of_the_whole() -> None:
    module, fast = tower(branch)
    x = torch.randn(3, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    with served(fast, "eager", "input-grad"):
        y = fast(x)
    same(torch.autograd.grad(y.sum(), x), (expected,))


@pytest.mark.slow
def test_a_copy_and_a_pickle_have_parts_of_their_own() -> None:
    module, fast = tower(branch)
    again = copy.deepcopy(fast)
    with quietly():
        check(again, module, torch.randn(3, 8), path=None)
        check(again, module, torch.randn(3, 8), path="mixed")
    before = counts(fast)
    assert before["mixed"] == 0


def test_the_reason_is_kept_and_the_parts_are_hits() -> None:
    _, fast = tower(branch)
    module, again = tower(branch)
    check(again, module, torch.randn(3, 8), path="mixed")
    assert plans(fast)[0]["cache"] == "off"
    (plan,) = plans(again)
    assert plan["cache"] == "hit"
    assert "capture" not in plan["seconds"]
    assert [inner["cache"] for part in plan["parts"] for inner in part["plans"]] == ["hit"] * 3


@pytest.mark.parametrize("lost", [True, False])
def test_a_race_leaves_the_generator_where_it_stood(
    monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    raced: list[float] = []

    def race(eager: Callable[[], Any], candidate: Callable[[], Any], budget: float) -> Finish:
        eager(), candidate(), eager()
        raced.append(budget)
        return Finish(1.0, 2.0, 0.5, 0.5) if lost else Finish(1.0, 0.5, 2.0, 2.0)

    monkeypatch.setattr("ovshim.parts._WORTH_SERVING_SECONDS", 0.0)
    monkeypatch.setattr("ovshim.parts.race", race)
    module, x = make(Tower, noise), torch.randn(3, 8)
    with torch.no_grad(), quietly():
        fast = ovshim.accelerate(module)
        for call in range(3):
            torch.manual_seed(call)
            expected = module(x), torch.rand(2)
            torch.manual_seed(call)
            same((fast(x), torch.rand(2)), expected)
    assert raced
    assert bool(counts(fast)["mixed"]) is not lost
