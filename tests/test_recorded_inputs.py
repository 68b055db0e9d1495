"""Inputs that were computed of what requires grad: behind another module, and between the parts of
one that stays in eager."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from checks import check, counts, eager_reasons, falls_back, plans, quietly, same, served
from modules import Mlp, make
from test_gradients import (
    PADDED,
    SCENARIOS,
    alike,
    autograd_grad,
    double_backward,
    encoder,
    grads,
    loss,
    outputs_written_to,
    three_times,
    untouched,
)
from test_parts import Tower, branch, noise, unsupported
from torch import Tensor, nn

import ovshim
from ovshim.bound import installed
from ovshim.scope import found, patient

X = torch.linspace(-1, 1, 24).view(3, 8)
SEVERAL: list[Any] = [autograd_grad, double_backward]
SLOW = [
    pytest.param(s, marks=pytest.mark.slow) for s in [*SCENARIOS, three_times] if s not in SEVERAL
]


def asked(of: nn.Module, scenario: Callable[[nn.Module, Any], Any]) -> Any:
    torch.manual_seed(0)
    try:
        return scenario(of, (X.clone(),))
    except RuntimeError as error:
        return error
    finally:
        of.requires_grad_()


def compared(fast: nn.Module, module: nn.Module, scenario: Callable[[nn.Module, Any], Any]) -> None:
    actual, expected = asked(fast, scenario), asked(module, scenario)
    if isinstance(expected, RuntimeError) and scenario is outputs_written_to:
        assert "modified by an inplace operation" in str(expected)  # of what eager alone has saved
    else:
        alike(actual, expected, 1e-2 if scenario.__name__ == "under_other_modes" else 1e-3)


# Behind another module


class Second(Mlp):
    """[batch, 4] → [batch, 2]"""

    def __init__(self) -> None:
        super().__init__(4, 8, 2)


def computed(batch: int = 3) -> Tensor:
    """[batch, 4]: what requires grad, and is no leaf."""
    answer: Tensor = make(Mlp)(torch.linspace(-1, 1, 8 * batch).view(batch, 8))
    return answer


def settled(fast: nn.Module, module: nn.Module, *args: Any, within: int = 4) -> None:
    """Call until OpenVINO has answered."""
    before = counts(fast)["openvino"]
    for _ in range(within):
        same(fast(*args), module(*args))
    assert counts(fast)["openvino"] > before, str(ovshim.explain(fast))


def second(module: nn.Module | None = None, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A module, and one that OpenVINO serves where its input was computed."""
    module = make(Second) if module is None else module
    fast = ovshim.accelerate(copy.deepcopy(module), prefer="openvino", **options)
    settled(fast, module, computed())
    return module, fast


@functools.cache
def chained() -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(
        *(ovshim.accelerate(make(cls), prefer="openvino") for cls in (Mlp, Second))
    )
    module = nn.Sequential(make(Mlp), make(Second))
    for _ in range(4):
        same(model(X), module(X))
    return module, model


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    yield
    chained.cache_clear()
    divided.cache_clear()


@pytest.mark.parametrize("scenario", [*SEVERAL, *SLOW])
def test_gradients_behind_another_module_are_eagers(scenario: Any) -> None:
    module, model = chained()
    module.zero_grad()
    for one in model.children():
        untouched(one)
    with served(model[0], "openvino"), served(model[1], "openvino"):  # type: ignore[index]
        compared(model, module, scenario)


def test_gradients_of_what_lies_between() -> None:
    module, fast = second()
    h = computed()
    with served(fast, "openvino"):
        y = fast(h)
    actual = torch.autograd.grad(loss(y), [h, *fast.parameters()])
    same(actual, torch.autograd.grad(loss(module(h)), [h, *module.parameters()]))


@pytest.mark.slow
def test_a_frozen_module_hands_gradients_on() -> None:
    module, fast = second(make(Second).requires_grad_(False))
    (plan,) = plans(fast)
    assert plan["signature"] == "[0]: float32[?, 4] requiring grad"
    h = computed()
    with served(fast, "openvino"):
        y = fast(h)
    same(torch.autograd.grad(loss(y), h), torch.autograd.grad(loss(module(h)), h))
    assert grads(fast) == [None] * 6


@pytest.mark.slow
def test_plans_are_kept_apart_by_what_requires_grad() -> None:
    """A frozen TransformerEncoder leaves padding out where nothing requires grad."""
    module = encoder().requires_grad_(False)
    fast = ovshim.accelerate(copy.deepcopy(module), prefer="openvino")
    x = torch.randn(2, 5, 16)
    h = nn.Linear(16, 16)(x)
    with quietly():
        for _ in range(4):
            for given in (x, h):
                same(fast(given, None, PADDED), module(given, None, PADDED))
    y, z = fast(h, None, PADDED), module(h, None, PADDED)
    same(torch.autograd.grad(y.exp().sum(), h), torch.autograd.grad(z.exp().sum(), h), 1e-3)


class Twice(nn.Module):
    """Given one tensor twice, and giving it back; integers beside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor, n: Tensor) -> dict[str, Any]:
        z = self.linear(x) * y.exp()
        return {"z": z, "x": x, "of x": x.cos(), "later": z.tanh().sum(-1), "n": n + 1}


@pytest.mark.slow
def test_one_tensor_in_two_places_and_in_the_output() -> None:
    module = make(Twice)
    fast = ovshim.accelerate(copy.deepcopy(module), prefer="openvino")
    h, n = computed(), torch.arange(3)
    settled(fast, module, h, h, n)
    with served(fast, "openvino"):
        y = fast(h, h, n)
    assert y["x"] is h
    z = module(h, h, n)
    for names in (["z"], ["x"], ["of x"], ["later"], ["later", "of x"], ["z", "later", "x"]):

        def gradients(out: Any, of: nn.Module, names: list[str] = names) -> Any:
            value = torch.stack([out[name].square().sum() for name in names]).sum()
            wanted = [h, *of.parameters()]
            return torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True)

        same(gradients(y, fast), gradients(z, module))


@pytest.mark.slow
def test_what_was_computed_and_changes_says_so() -> None:
    _, fast = second()
    h = computed()
    y = fast(h)
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(y).backward()


def test_what_is_trained_through_is_not_built_for() -> None:
    """A loss by a frozen module: a backward pass after each call."""
    fast = ovshim.accelerate(make(Second).requires_grad_(False), prefer="openvino")
    for _ in range(4):
        loss(fast(computed())).backward()
    assert plans(fast) == []
    assert eager_reasons(fast) == {"seldom": 1, "backward": 3}


@pytest.mark.slow
def test_leaves_that_require_grad_are_eagers() -> None:
    module = make(Second)
    fast = ovshim.accelerate(copy.deepcopy(module), prefer="openvino")
    for _ in range(3):
        x = computed().detach().requires_grad_()
        with served(fast, "eager", "input-grad"):
            y = fast(x)
        same(torch.autograd.grad(loss(y), x), torch.autograd.grad(loss(module(x)), x))
    assert plans(fast) == []


@pytest.mark.slow
def test_out_of_the_cache_and_in_another_thread() -> None:
    second()
    module, fast = second()
    assert [plan["cache"] for plan in plans(fast)] == ["hit"]
    late = ovshim.accelerate(copy.deepcopy(module), prefer="openvino", background=True)
    h = computed()
    late(h), late(h)
    assert late.ovshim.wait(60)
    with served(late, "openvino"):
        y = late(h)
    same(torch.autograd.grad(loss(y), h), torch.autograd.grad(loss(module(h)), h))


# Between parts

WAYS = {"branch": branch, "operator": unsupported, "random": noise}


@functools.cache
def divided(way: str) -> tuple[nn.Module, nn.Module]:
    module = make(Tower, WAYS[way])
    fast = ovshim.accelerate(copy.deepcopy(module), prefer="openvino")
    with quietly():
        for _ in range(3):
            alike(
                asked(fast, lambda of, args: of(*args)),
                asked(module, lambda of, args: of(*args)),
                1e-4,
            )
    return module, fast


@pytest.mark.parametrize("scenario", [*SEVERAL, *SLOW])
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=() if way == "branch" else pytest.mark.slow) for way in WAYS]
)
def test_gradients_of_a_module_in_parts_are_eagers(way: str, scenario: Any) -> None:
    module, fast = divided(way)
    module.zero_grad()
    untouched(fast)
    with served(fast, "mixed"):
        compared(fast, module, scenario)


def test_parts_serve_in_grad_mode_until_a_backward_pass() -> None:
    module = make(Tower, branch)
    with falls_back("value-dependent"):
        fast = ovshim.accelerate(copy.deepcopy(module), prefer="openvino")
        fast(X)
        for _ in range(2):
            check(fast, module, X, path="mixed", under=torch.enable_grad)
        (plan,) = plans(fast)
        assert plan["grad"]
        assert [inner["path"] for part in plan["parts"] for inner in part["plans"]] == [
            "openvino"
        ] * 3
        loss(fast(X)).backward()
        check(fast, module, X, path="eager", reason="backward", under=torch.enable_grad)
    loss(module(X)).backward()
    same(grads(fast), grads(module))


class Chooses(nn.Module):
    """Which weights are reached, and whether any, is a matter of values."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = Mlp(8, 16, 8), Mlp(8, 16, 4), Mlp(8, 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        if x.sum() > 30:
            return x.cos()
        y: Tensor = self.left(h) if x.sum() > 0 else self.right(h) * self.left(h)
        return y


@pytest.mark.slow
def test_what_a_branch_reaches() -> None:
    module = make(Chooses)
    fast = ovshim.accelerate(copy.deepcopy(module), prefer="openvino")
    inputs = [X + shift for shift in (0.5, -0.5, 9.0)]
    with quietly():
        for _ in range(2):
            for x in inputs:
                y, z = fast(x), module(x)
                same(y, z)
                assert y.requires_grad is z.requires_grad
    assert counts(fast)["mixed"] >= 3
    for x in inputs[:2]:
        module.zero_grad()
        untouched(fast)
        with served(fast, "mixed"):
            loss(fast(x)).backward()
        loss(module(x)).backward()
        assert [g is None for g in grads(fast)] == [g is None for g in grads(module)]
        same(grads(fast), grads(module))


@pytest.mark.slow
def test_hooks_and_modes_between_parts() -> None:
    module, fast = make(Tower, branch), ovshim.accelerate(make(Tower, branch), prefer="openvino")
    with quietly():
        for _ in range(2):
            fast(X)
        with served(fast, "eager", "special-mode"), torch.autograd.graph.save_on_cpu():
            y = fast(X)
        same(y, module(X))
        met: list[Any] = []
        for one in (fast, module):
            inner = one.get_submodule("blocks.1")
            handle = inner.register_full_backward_hook(lambda m, a, b: met.append(b))
            loss(one(X)).backward()
            handle.remove()
    same(met[0], met[1])


@pytest.mark.slow
def test_parts_made_in_another_thread_record_gradients() -> None:
    module = make(Tower, branch)
    fast = ovshim.accelerate(copy.deepcopy(module), prefer="openvino", background=True)
    with quietly():
        fast(X)
        assert fast.ovshim.wait(60)
        with served(fast, "mixed"):
            y = fast(X)
    loss(y).backward()
    loss(module(X)).backward()
    same(grads(fast), grads(module))


class WithoutGrad(nn.Module):
    """A frozen body by `no_grad`, a branch, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Mlp(8, 16, 8), Mlp(8, 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = branch(self.body(x))
        y: Tensor = self.head(h)
        return y


@pytest.mark.slow
def test_a_part_that_is_called_without_gradients() -> None:
    module = make(WithoutGrad)
    fast = ovshim.accelerate(copy.deepcopy(module), prefer="openvino")
    with quietly():
        fast(X)
    (plan,) = plans(fast)
    assert [p["module"] for p in plan["parts"]] == ["body", "head"]
    with served(fast, "mixed"):
        loss(fast(X)).backward()
    loss(module(X)).backward()
    same(grads(fast), grads(module))


@pytest.mark.slow
def test_programs_that_call_one_module_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    for room, name in (
        (patient, "_WORTH_BUILDING"),
        (patient, "_WORTH_LOOKING_UP"),
        (found, "_WORTH_A_LOOK"),
    ):
        monkeypatch.setattr(room, name, 0.0)  # every build pays
    module = nn.Sequential(make(Mlp), make(Second))
    first, last = copy.deepcopy(module)
    with ovshim.enabled(prefer="openvino") as scope:
        for _ in range(8):
            same(last(first(X)), module(X))
        loss(last(first(X))).backward()
    rows = {row.module: row.calls for row in scope.report().rows}
    assert rows["Mlp"]["openvino"] > 0
    assert rows["Second"]["openvino"] > 0
    loss(module(X)).backward()
    same([*grads(first), *grads(last)], grads(module))


def test_parts_of_both_modes_share_their_graphs() -> None:
    module = make(Tower, branch)
    fast = ovshim.accelerate(copy.deepcopy(module), prefer="openvino")
    with quietly():
        for under in (torch.no_grad, torch.enable_grad):
            for _ in range(2):
                check(fast, module, X, path=None, under=under)
    (bound,) = installed(fast).values()
    plain, recording = bound.dispatcher.plans  # type: ignore[attr-defined]
    for name in plain.parts.served():
        engines = [
            part.dispatcher._planner.plans[0].served.engine  # type: ignore[attr-defined]
            for plan in (plain, recording)
            for part in installed(plan.parts.tree.get_submodule(name)).values()
        ]
        assert engines[0] is engines[1]
    assert {part["plans"][0]["cache"] for part in plans(fast)[1]["parts"]} == {"hit"}
    assert counts(fast)["mixed"] == 2
