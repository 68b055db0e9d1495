"""`max_plans`: plans that were used longest ago make room, and nothing is built to go at once."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import check, counts, eager_reasons, plans, quietly, standing
from modules import make
from torch import Tensor, nn

import ovshim
from ovshim import planner
from ovshim.families import WORTH_BUILDING
from ovshim.unplanned import Unplanned


class Scaled(nn.Module):
    """Every value of its constant is a kind of call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        scaled: Tensor = self.linear(x) * scale
        return scaled


X = torch.randn(3, 8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all, so that each kind is captured once."""
    return tmp_path_factory.mktemp("cache")


def accelerated(cache: Any, most: int) -> tuple[nn.Module, Any]:
    module = make(Scaled)
    return module, ovshim.accelerate(module, prefer="openvino", max_plans=most, cache_dir=cache)


def call(fast: Any, *scales: float) -> None:
    with quietly(), torch.inference_mode():
        for scale in scales:
            fast(X, scale)


def test_what_was_used_longest_ago_makes_room(cache: Any) -> None:
    module, fast = accelerated(cache, 2)
    call(fast, 1.0, 1.0, 2.0, 2.0, 1.0)
    one, two = standing(fast)
    engine = weakref.ref(two.served.engine)
    assert (one.calls.value, two.calls.value) == (2, 0), "the older one was used later"
    call(fast, 3.0)  # there are enough plans for it to have to come twice
    assert standing(fast) == [one, two]
    call(fast, 3.0)
    kept, three = standing(fast)
    assert kept is one
    check(fast, module, X, 3.0)
    del two, three
    gc.collect()
    assert engine() is None, "what makes room gives its memory back"
    assert fast.ovshim.stats()["openvino"] == 3, "its calls are counted all the same"


def test_what_had_to_make_room_has_to_come_often(cache: Any) -> None:
    module, fast = accelerated(cache, 1)
    call(fast, 1.0, 1.0, 1.0, 2.0, 2.0)
    assert len(standing(fast)) == 1
    with pytest.warns(ovshim.FallbackWarning, match="more ways than plans") as told:
        check(fast, module, X, 1.0, path="eager", reason="too-many-plans")
    assert "max_plans" in str(told[0].message)
    call(fast, *[1.0] * (2 * WORTH_BUILDING - 1))
    check(fast, module, X, 1.0)


def test_constants_that_never_come_again_build_nothing(cache: Any) -> None:
    module, fast = accelerated(cache, 2)
    call(fast, 1.0)
    (first,) = standing(fast)
    call(fast, *map(float, range(10, 310)))
    assert standing(fast) == [first]
    assert fast.ovshim.report().to_dict()["eager_reasons"]["seldom"] == 300
    check(fast, module, X, 1.0)


def test_other_sizes_are_no_other_kind(cache: Any) -> None:
    """A plan that is opened for more sizes takes the place of the one that it covers."""
    module = make(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()))  # type: ignore[arg-type]
    fast = ovshim.accelerate(module, prefer="openvino", max_plans=1, cache_dir=cache)
    with torch.inference_mode():
        for length in (3, 4, 5, 6):
            fast(torch.randn(2, length, 8))
    check(fast, module, torch.randn(2, 9, 8))
    assert len(standing(fast)) == 1


class Counts(nn.Module):
    """Writes to a buffer, or to an attribute, in each call."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.linear, self.buffer, self.counting, self.calls = nn.Linear(8, 4), buffer, True, 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.counting and self.buffer:
            self.count += 1
        elif self.counting:
            self.calls += 1
        return self.linear(x)


@pytest.mark.parametrize("buffer", [True, False])
def test_what_each_call_changes_is_built_seldom_and_goes_to_eager_at_a_glance(
    buffer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = make(Counts, buffer), torch.randn(3, 8)
    built, unplanned = list[int](), list[int]()
    monkeypatch.setattr(planner, "_built", noted(planner._built, built))
    with quietly():
        fast: Any = ovshim.accelerate(module, x, prefer="openvino", cache_dir=False)
        monkeypatch.setattr(Unplanned, "_unplanned", noted(Unplanned._unplanned, unplanned))
        with torch.inference_mode():
            for _ in range(3000):
                assert torch.equal(fast(x), module.linear(x))
    assert (fast.count if buffer else fast.calls) == 3000
    code = "mutates-buffer" if buffer else "mutates-attribute"
    assert plans(fast)[0]["reason"]["code"] == code
    assert sum(eager_reasons(fast).values()) == 3000
    assert len(built) < 20
    assert len(unplanned) < 40


def noted(function: Any, calls: list[int]) -> Any:
    def note(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    return note


def test_what_changes_no_more_is_accelerated_after_all() -> None:
    module, x = make(Counts, True), torch.randn(3, 8)
    with quietly(), torch.inference_mode():
        fast: Any = ovshim.accelerate(module, x, prefer="openvino", cache_dir=False)
        for _ in range(60):
            fast(x)
        fast.counting = False
        for _ in range(300):
            assert torch.allclose(fast(x), module.linear(x), atol=1e-6)
    assert fast.count == 60
    assert counts(fast)["openvino"] > 0


def test_strict_raises_at_each_call() -> None:
    module, x = make(Counts, True), torch.randn(3, 8)
    fast: Any = ovshim.accelerate(module, strict=True, prefer="openvino", cache_dir=False)
    with torch.inference_mode():
        for _ in range(300):
            with pytest.raises(ovshim.FallbackError):
                fast(x)
